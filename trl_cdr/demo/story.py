"""The demo: does the ratio of two mostly wrong models label well, and does a policy that trains on it improve?

`run_demo` is `trl-cdr demo`. It builds the tiny world's models, measures how often the ratio and its baselines prefer
the right one of two completions, trains the policy by TRL's `OnlineDPOTrainer` on three rewards (CDR; gold, the upper
bound; random, the control) and writes `summary.json` and `gold.png`. Only the evaluation and the upper bound read the
gold reward. The language is `world`'s, the models are `models`', the drawing is `figure`'s.

It is a command, not a library: the trainer seeds the global random state from its own arguments.
"""

import contextlib
import json
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from .. import __version__
from ..annotation.rewardbench import credit
from ..scoring.scorer import DensityRatioScorer
from ..training.reward import CDRReward
from . import models, world
from .figure import draw_gold

SEED = 0
STEPS = 120
EVALUATE_EVERY = 15
EVALUATION_SAMPLES = 4
PAIR_SAMPLES = 8
PAIRS_PER_PROMPT = 3

TINY_RUN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Of a trainer's arguments: a run on the CPU that says and keeps nothing."""

Reward = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Pair:
    """Two completions to one prompt, both written by the policy; gold calls the first right and the second wrong."""

    prompt: list[world.Message]
    domain: str
    right: models.Sample
    wrong: models.Sample


def run_demo(output_dir: str | Path, *, cache: bool = True) -> dict[str, Any]:
    """Run the whole demo, print a table on stdout and write `summary.json` and `gold.png`.

    Args:
        output_dir (`str` or `Path`): Folder for the two files; made if missing.
        cache (`bool`): Take the models of an earlier run; `False` trains them again.

    Returns:
        `dict`: What `summary.json` holds: `accuracy` (shares of pairs), `gold` (mean gold reward on held-out prompts at
        the start and after training on each reward), `curves`, `settings`, `seconds` (total), `parts` (seconds a
        part), `versions`.

    Raises:
        OSError: the output folder can't be written.
        ConfigError: the cache can't.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with models.one_thread(), models.quiet():
        checkpoints = models.build_checkpoints(cache)
        clock.lap("build")
        accuracy = measure_accuracy(checkpoints, seed=SEED)
        clock.lap("accuracy")
        rewards: dict[str, Reward] = {
            "cdr": CDRReward(strong=str(checkpoints.mild), weak=str(checkpoints.base), device="cpu"),
            "gold": gold_reward(models.build_tokenizer().eos_token_id),
            "random": random_reward(SEED),
        }
        curves = {}
        for name, reward in rewards.items():
            curves[name] = train_policy(checkpoints.policy, reward, name=name, seed=SEED)
            clock.lap(name)
    draw_gold(curves, folder / "gold.png")
    clock.lap("figure")
    summary = {
        "accuracy": accuracy,
        "gold": {"start": curves["cdr"]["gold"][0]} | {name: curve["gold"][-1] for name, curve in curves.items()},
        "curves": curves,
        "settings": {"seed": SEED, "steps": STEPS, "recipe_version": models.RECIPE_VERSION},
        "seconds": round(sum(clock.parts.values()), 1),
        "parts": {part: round(seconds, 1) for part, seconds in clock.parts.items()},
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _print_tables(summary, folder)
    return summary


def measure_accuracy(checkpoints: models.Checkpoints, *, seed: int) -> dict[str, float]:
    """How often each judge prefers the right completion of a pair that the policy wrote to a held-out prompt.

    The judges: the ratio of mild over base; either model's log-probability alone; the shorter completion; chance. A tie
    counts half. `pairs` is their number.
    """
    pairs = sample_pairs(checkpoints.policy, seed=seed)
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    samples = [one for pair in pairs for one in (pair.right, pair.wrong)]
    scorer = DensityRatioScorer(strong=str(checkpoints.mild), weak=str(checkpoints.base), device="cpu")
    scores = scorer.score(prompts, [one.text for one in samples], finished=[one.finished for one in samples])
    rng = random.Random(seed)
    judges: dict[str, list[Any]] = {
        "ratio": [score.value for score in scores],
        "strong_logp": [score.strong_logps for score in scores],
        "weak_logp": [score.weak_logps for score in scores],
        "length": [-len(one.text.split()) for one in samples],
        "random": [rng.random() for _ in samples],
    }
    return {name: preferred(values[0::2], values[1::2]) for name, values in judges.items()} | {"pairs": len(pairs)}


def train_policy(
    policy: Path,
    reward: Reward,
    *,
    name: str,
    seed: int,
    steps: int = STEPS,
    batch_size: int = 32,
    beta: float = 0.5,
    evaluate_every: int = EVALUATE_EVERY,
) -> dict[str, list[float]]:
    """Train a copy of the policy on `reward` by TRL's online DPO.

    Args:
        steps, batch_size, beta: The trainer's; `batch_size` counts prompts.
        others: As for `train_with`, and so is what is returned.
    """
    with quiet_trl():
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # warns: not at the top
    return train_with(
        policy,
        reward,
        trainer=OnlineDPOTrainer,
        config=OnlineDPOConfig,
        name=f"online DPO, {name} reward",
        seed=seed,
        steps=steps,
        evaluate_every=evaluate_every,
        learning_rate=1e-3,
        beta=beta,
        max_new_tokens=models.MAX_NEW_TOKENS,
        per_device_train_batch_size=batch_size,
    )


def train_with(
    policy: Path,
    reward: Reward,
    *,
    trainer: type,
    config: type,
    name: str,
    seed: int,
    steps: int,
    evaluate_every: int,
    keep: Path | None = None,
    **options: Any,
) -> dict[str, list[float]]:
    """Train a copy of the policy on `reward`, and measure its gold reward meanwhile.

    Args:
        policy (`Path`): Its checkpoint.
        reward (`Reward`): A reward function.
        trainer, config (`type`): The trainer, and the class of its arguments.
        name (`str`): What the progress bar says.
        seed (`int`): The trainer's, and the evaluation's.
        steps (`int`): The trainer's.
        evaluate_every (`int`): Steps between two measurements of the gold reward.
        keep (`Path`, *optional*): Folder for the trained policy and its tokenizer; without it both are thrown away.
        **options: The trainer's other arguments.

    Returns:
        The curve: `steps`; `gold`, the mean gold reward on held-out prompts after so many steps; `seconds`, what
        training took until then, measurements apart.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy)
    with quiet_trl(), tempfile.TemporaryDirectory() as scratch, models.progress() as bars:
        bar = bars.add_task(name, total=steps)
        evaluation = _Evaluation(tokenizer, seed=seed, every=evaluate_every, advance=partial(bars.advance, bar))
        run = trainer(
            model=AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=reward,
            args=config(
                output_dir=scratch,
                seed=seed,
                max_steps=steps,
                temperature=1.0,
                **TINY_RUN,
                **options,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": world.conversation(task), "domain": task.domain} for task in world.TRAIN]
            ),
            processing_class=tokenizer,
            callbacks=[evaluation],
        )
        run.remove_callback(PrinterCallback)
        run.train()
        if keep is not None:
            run.save_model(str(keep))
    return evaluation.curve


def gold_reward(end_token_id: int) -> Reward:
    """The gold rules as a reward function: the upper bound. A completion without the end token was cut off."""

    def gold(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rows = zip(prompts, completions, completion_ids, strict=True)
        return [world.gold(prompt, said[-1]["content"], end_token_id in ids) for prompt, said, ids in rows]

    return gold


def random_reward(seed: int) -> Reward:
    """A reward function that knows nothing: the control."""
    rng = random.Random(seed)

    def random_control(prompts: list[Any], **_: Any) -> list[float]:
        return [rng.random() for _ in prompts]

    return random_control


class _Evaluation(TrainerCallback):  # type: ignore[misc]
    """Measure the policy's gold reward before training and every so many steps."""

    def __init__(self, tokenizer: Any, *, seed: int, every: int, advance: Callable[[], None]) -> None:
        self.curve: dict[str, list[float]] = {"steps": [], "gold": [], "seconds": []}
        self._seconds = 0.0
        self._since = 0.0
        self._tokenizer = tokenizer
        self._seed = seed
        self._every = every
        self._advance = advance

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()
        self._measure(kwargs["model"], step=0)

    def on_step_end(self, _: TrainingArguments, state: TrainerState, *__: Any, **kwargs: Any) -> None:
        self._advance()
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"], step=state.global_step)

    def _measure(self, model: Any, *, step: int) -> None:
        self._seconds += time.perf_counter() - self._since
        prompts = [world.conversation(task) for task in world.HELD_OUT]
        groups = models.sample(model, self._tokenizer, prompts=prompts, per_prompt=EVALUATION_SAMPLES, seed=self._seed)
        rows = [(prompt, one) for prompt, group in zip(prompts, groups, strict=True) for one in group]
        self.curve["steps"].append(step)
        self.curve["gold"].append(sum(world.gold(prompt, one.text, one.finished) for prompt, one in rows) / len(rows))
        self.curve["seconds"].append(self._seconds)
        self._since = time.perf_counter()


class Clock:
    """Seconds by part of the demo."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = now - self._last
        self._last = now


def sample_pairs(policy: Path, *, seed: int) -> list[Pair]:
    """Up to `PAIRS_PER_PROMPT` pairs of a right and a wrong completion to each held-out prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    prompts = [world.conversation(task) for task in world.HELD_OUT]
    groups = models.sample(model, tokenizer, prompts=prompts, per_prompt=PAIR_SAMPLES, seed=seed)
    pairs = []
    for task, prompt, group in zip(world.HELD_OUT, prompts, groups, strict=True):
        right = [one for one in group if world.gold(prompt, one.text, one.finished)]
        wrong = [one for one in group if one not in right]
        pairs += [Pair(prompt, task.domain, *two) for two in list(zip(right, wrong, strict=False))[:PAIRS_PER_PROMPT]]
    return pairs


def preferred(right: list[float], wrong: list[float]) -> float:
    """The share of pairs in which the right completion's value is the higher one; a tie counts half."""
    wins = [credit([r], [w]) for r, w in zip(right, wrong, strict=True)]
    return sum(wins) / len(wins)


@contextlib.contextmanager
def quiet_trl() -> Iterator[None]:
    """Hide what TRL's own code warns of and no user of the demo can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trl.experimental")
        # TRL 1.16 uses the names that transformers 5.23 renamed to activation_checkpointing; drop when TRL follows.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def versions() -> dict[str, str]:
    versions = {package.__name__: str(package.__version__) for package in (torch, transformers, trl)}
    return {"python": platform.python_version(), **versions, "trl_cdr": __version__}


def _print_tables(summary: dict[str, Any], folder: Path) -> None:
    accuracy, gold = summary["accuracy"], summary["gold"]
    judges = {
        "ratio": "CDR: mild over base",
        "strong_logp": "mild's log-probability",
        "weak_logp": "base's log-probability",
        "length": "shorter",
        "random": "random",
    }
    labels = Table("label from", "right")
    for key, label in judges.items():
        labels.add_row(label, f"{accuracy[key]:.1%}")
    training = Table("reward", "gold")
    for key, label in {"start": "(before training)", "cdr": "CDR", "gold": "gold itself", "random": "random"}.items():
        training.add_row(label, f"{gold[key]:.2f}")
    console = Console()
    console.print(
        f"Which of two completions is right? {accuracy['pairs']} pairs that the policy wrote", labels, sep="\n"
    )
    console.print(f"Gold reward on held-out prompts after {STEPS} steps of online DPO", training, sep="\n")
    console.print(f"{summary['seconds']:.0f} s. Wrote summary.json and gold.png to {folder}", soft_wrap=True)
