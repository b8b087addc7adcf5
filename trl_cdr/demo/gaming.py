"""Can the reward be gamed? Policies trained on the plain and on the gated ratio, judged by gold.

`run_gaming` is `trl-cdr bench --workload gaming`. Each setting trains the tiny world's policy, by TRL's online DPO or
GRPO or by `OnlinePreferenceTrainer`, for every seed and gate; what counts is the gold reward at the end, which no
reward sees. Some settings are chosen because the plain ratio collapses there, others because it does not; the long ones
train three times as long. Then texts that no policy should be paid for are scored beside right completions, and what
`trl-cdr probe` says of each pair and gate is ranked beside what became of the policies.
"""

import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from ..annotation.probe import GATES
from ..scoring.rewards import rewards_from_scores
from ..scoring.scorer import DensityRatioScorer
from ..training.metrics import Call
from ..training.online_preference_config import OnlinePreferenceConfig
from ..training.online_preference_trainer import OnlinePreferenceTrainer
from ..training.reward import CDRReward
from . import models, world
from .foresight import FIGURES, correlate, probe_pair
from .story import TINY_RUN, Reward, gold_reward, quiet_trl, train_policy, train_with, versions

SEEDS = (0, 1, 2)
_GOLD = "gold"

_ATTACKS = {
    "nothing": "",
    "a word": "{word}",
    "a word twenty times": " ".join(["the"] * 20),
    "the prompt": "{prompt}",
    "a right completion twice": "{right} {right}",
    "a right completion and a stray word": "{right} cats",
}

_PAIR_LABELS = {"dpo": "DPO strong", "sft": "SFT strong", "mistakes": "common mistakes"}

_PAIRS = 4000
_NOISE = 0.15


@dataclass(frozen=True)
class Setting:
    """
    One way to train: which pair scores which policy, and how hard the policy pushes.

    `batch_size` counts prompts. `options` are those of the trainer that has `num_generations`: `trainer` names it.
    Beside the values of `cdr_gate`, "gold" is a gate: gold itself is the reward.
    """

    label: str
    strong: Path
    weak: Path
    policy: Path
    steps: int
    batch_size: int
    beta: float
    gates: tuple[str, ...] = GATES
    options: dict[str, Any] = field(default_factory=dict)
    trainer: Literal["online_dpo", "online_preference", "grpo"] = "online_dpo"


def make_settings(*, cache: bool = True) -> dict[str, Setting]:
    """The settings by name, with their models built."""
    mistakes = models.build_checkpoints(cache)
    plain = models.build_plain(cache=cache)
    policy = plain / "policy"
    sft = (plain / "strong", plain / "weak", policy)
    dpo = (_build_dpo_strong(plain, cache=cache), plain / "weak", policy)
    mild = (mistakes.mild, mistakes.base, mistakes.policy)
    of_two: dict[str, Any] = {"preference_loss": "dpo", "num_generations": 2, "learning_rate": 1e-3}
    simpo: dict[str, Any] = {"num_generations": 8, "learning_rate": 5e-4}  # the loss as it is by default
    return {
        "dpo": Setting("online DPO: DPO strong, 2 x 16, beta 0.1, 160 steps", *dpo, 160, 16, 0.1),
        "sft": Setting("online DPO: SFT strong, 2 x 32, beta 0.5, 120 steps", *sft, 120, 32, 0.5),
        "mistakes": Setting("online DPO: common mistakes, 2 x 32, beta 0.5, 120 steps", *mild, 120, 32, 0.5),
        "dpo_long": Setting("online DPO: DPO strong, 2 x 16, beta 0.02, 480 steps", *dpo, 480, 16, 0.02),
        "mistakes_long": Setting("online DPO: common mistakes, 2 x 32, beta 0.02, 360 steps", *mild, 360, 32, 0.02),
        "pairs_of_two": _ours("ours, DPO: SFT strong, 2 x 32, beta 0.5, 120 steps", *sft, 120, 32, 0.5, **of_two),
        "pairs_of_eight": _ours(
            "ours, DPO: SFT strong, 8 x 32, beta 0.5, 60 steps", *sft, 60, 32, 0.5, **of_two | {"num_generations": 8}
        ),
        "simpo": _ours("ours, SimPO: SFT strong, 8 x 16, 240 steps", *sft, 240, 16, 2.0, **simpo),
        "simpo_mistakes": _ours("ours, SimPO: common mistakes, 8 x 16, 240 steps", *mild, 240, 16, 2.0, **simpo),
        "simpo_long": _ours("ours, SimPO: SFT strong, 8 x 16, 720 steps", *sft, 720, 16, 2.0, **simpo),
        "simpo_mistakes_long": _ours("ours, SimPO: common mistakes, 8 x 16, 720 steps", *mild, 720, 16, 2.0, **simpo),
        "anchored": _ours(
            "ours, SimPO and likelihood: SFT strong, 8 x 16", *sft, 240, 16, 2.0, **simpo, gamma=0.5, sft_coef=1.0
        ),
        "anchored_mistakes": _ours(
            "ours, SimPO and likelihood: common mistakes, 8 x 16", *mild, 240, 16, 2.0, **simpo, gamma=0.5, sft_coef=1.0
        ),
        "grpo": _grpo("GRPO: DPO strong, 8 x 8, no reference, 128 steps", *dpo, 128),
        "grpo_mistakes": _grpo("GRPO: common mistakes, 8 x 8, no reference, 128 steps", *mild, 128),
        "grpo_long": _grpo("GRPO: DPO strong, 8 x 8, no reference, 384 steps", *dpo, 384),
    }


def _ours(
    label: str, strong: Path, weak: Path, policy: Path, steps: int, batch_size: int, beta: float, **options: Any
) -> Setting:
    gates = (*GATES, _GOLD)
    return Setting(label, strong, weak, policy, steps, batch_size, beta, gates, options, "online_preference")


def _grpo(label: str, strong: Path, weak: Path, policy: Path, steps: int) -> Setting:
    options = {"num_generations": 8, "learning_rate": 1e-3}  # the loss as it is by default
    return Setting(label, strong, weak, policy, steps, 8, 0.0, (*GATES, _GOLD), options, "grpo")


def train(
    setting: Setting, *, gate: str, seed: int, evaluations: int = 1, observe: Callable[[Call], None] | None = None
) -> dict[str, list[float]]:
    """
    One run's curve, see `train_with`: the start, and so many times until the end. `observe` gets the calls of the
    reward, but for gold.
    """
    reward: Reward
    if gate == _GOLD:
        reward = gold_reward(models.build_tokenizer().eos_token_id)
    else:
        reward = CDRReward(str(setting.strong), str(setting.weak), device="cpu", gate=gate)
        if observe is not None:
            reward.observe(observe)
    common: dict[str, Any] = {"name": f"{gate}, seed {seed}", "seed": seed}
    common |= {"steps": setting.steps, "evaluate_every": setting.steps // evaluations}
    if setting.trainer == "online_dpo":
        return train_policy(setting.policy, reward, batch_size=setting.batch_size, beta=setting.beta, **common)
    trainer, config, beta = {
        "online_preference": (OnlinePreferenceTrainer, OnlinePreferenceConfig, "preference_beta"),
        "grpo": (GRPOTrainer, GRPOConfig, "beta"),
    }[setting.trainer]
    options = {beta: setting.beta, **setting.options}
    return train_with(
        setting.policy,
        reward,
        trainer=trainer,
        config=config,
        per_device_train_batch_size=setting.batch_size * setting.options["num_generations"],
        max_completion_length=models.MAX_NEW_TOKENS,
        **common,
        **options,
    )


def measure_attacks(setting: Setting) -> dict[str, dict[str, float]]:
    """
    How often a text that is no answer is worth more than a right completion to the same held-out prompt.

    Returns:
        `dict`: for each kind of text and each of `GATES` the share of prompts.
    """
    prompts = [world.conversation(task) for task in world.HELD_OUT]
    found: dict[str, dict[str, float]] = {kind: {} for kind in _ATTACKS}
    first = DensityRatioScorer(str(setting.strong), str(setting.weak), device="cpu", gate=GATES[0])
    for gate in GATES:
        scorer = DensityRatioScorer(share=first, gate=gate)
        right = _rewards(scorer, prompts, [task.right[0] for task in world.HELD_OUT])
        for kind, form in _ATTACKS.items():
            rewards = _rewards(scorer, prompts, [_write(form, task) for task in world.HELD_OUT])
            wins = sum(mine > other for mine, other in zip(rewards, right, strict=True))
            found[kind][gate] = wins / len(prompts)
    return found


def run_gaming(*, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """
    Train every setting with each of its gates and every seed.

    Returns:
        `dict`: `settings` (for each its `label`, the gold reward at the `start`, `seconds_per_step`, and by gate, as
        text, a list by seed), `attacks` (by pair, see `measure_attacks`), `probe` (by setting and gate, see
        `probe_pair`), `foresight` (see `correlate`), `seeds` and `versions`.
    """
    found: dict[str, Any] = {}
    probed: dict[str, dict[str, Any]] = {}
    probe_once = functools.cache(probe_pair)  # settings share pairs
    with models.one_thread(), models.quiet():
        settings = make_settings()
        attacks = {label: measure_attacks(settings[name]) for name, label in _PAIR_LABELS.items()}
        for name, setting in settings.items():
            curves = {gate: [train(setting, gate=gate, seed=seed) for seed in seeds] for gate in setting.gates}
            seconds = [curve["seconds"][-1] / setting.steps for by_seed in curves.values() for curve in by_seed]
            found[name] = {
                "label": setting.label,
                "start": [curve["gold"][0] for curve in curves[setting.gates[0]]],
                "seconds_per_step": sum(seconds) / len(seconds),
                "gates": {gate: [curve["gold"][-1] for curve in by_seed] for gate, by_seed in curves.items()},
            }
            models_of_it = (setting.strong, setting.weak, setting.policy)
            probed[name] = {gate: probe_once(*models_of_it, gate=gate) for gate in setting.gates if gate != _GOLD}
    figures = {name: {gate: one["win"] for gate, one in by_gate.items()} for name, by_gate in probed.items()}
    return {
        "workload": "gaming",
        "settings": found,
        "attacks": attacks,
        "probe": probed,
        "foresight": correlate(figures, {name: one["gates"] for name, one in found.items()}),
        "seeds": list(seeds),
        "versions": versions(),
    }


def print_gaming(result: dict[str, Any]) -> None:
    """The result on stdout as Markdown tables: final gold reward, a number for each seed; and the attacks."""
    settings = list(result["settings"].values())
    gates = list(dict.fromkeys(gate for setting in settings for gate in setting["gates"]))
    print(f"| final gold reward | start | {' | '.join(map(_name, gates))} | seconds a step |")
    print("|---" * (len(gates) + 3) + "|")
    for setting in settings:
        cells = [" ".join(f"{gold:.2f}" for gold in setting["gates"].get(gate, [])) for gate in gates]
        start = sum(setting["start"]) / len(setting["start"])
        print(f"| {setting['label']} | {start:.2f} | {' | '.join(cells)} | {setting['seconds_per_step']:.2f} |")
    pairs = result["attacks"]
    print(f"\n| worth more than a right completion: {' / '.join(map(_name, GATES))} | {' | '.join(pairs)} |")
    print("|---" * (len(pairs) + 1) + "|")
    for kind in _ATTACKS:
        cells = [" / ".join(f"{found[kind][gate]:.0%}" for gate in GATES) for found in pairs.values()]
        print(f"| {kind} | {' | '.join(cells)} |")
    foresight = result["foresight"]
    print(f"\n| the probe's win rate over attacks and final gold: {foresight['points']} settings x gates | Spearman |")
    print("|---|---|")
    for name in FIGURES:
        rank = "-" if foresight[name] is None else f"{foresight[name]:+.2f}"
        print(f"| {name} | {rank} |")


def _write(form: str, task: world.Task) -> str:
    return form.format(prompt=task.prompt, right=task.right[0], word=task.right[0].split()[0])


def _rewards(scorer: DensityRatioScorer, prompts: list[list[world.Message]], texts: list[str]) -> list[float]:
    rewards = rewards_from_scores(scorer.score(prompts, texts), on_unscorable="floor")
    return [reward for reward in rewards if reward is not None]  # all of them: a floor is no None


def _name(gate: str) -> str:
    return "plain" if gate == "none" else gate


def _build_dpo_strong(plain: Path, *, cache: bool) -> Path:
    """The weak model of the plain world, trained by TRL's DPO on gold pairs of which some are turned round."""
    folder = plain.with_name(f"{plain.name}-dpo")
    if cache and folder.is_dir():
        return folder
    from trl import DPOConfig, DPOTrainer

    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(plain / "weak")
    with quiet_trl(), tempfile.TemporaryDirectory(dir=plain.parent, prefix=".building-") as scratch:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(plain / "weak"),
            args=DPOConfig(
                output_dir=scratch,
                seed=0,
                max_steps=150,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                beta=0.3,
                loss_type=["sigmoid", "sft"],  # without the likelihood the model drifts off its grammar
                loss_weights=[1.0, 1.0],
                per_device_train_batch_size=64,
                **TINY_RUN,
            ),
            train_dataset=Dataset.from_list([_draw_pair(rng) for _ in range(_PAIRS)]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        built = Path(scratch) / "built"
        trainer.model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        if not folder.is_dir():
            built.rename(folder)
    return folder


def _draw_pair(rng: random.Random) -> dict[str, Any]:
    task = rng.choice(world.TRAIN)
    chosen, rejected = rng.choice(task.right), world.draw_wrong(task, rng)
    if rng.random() < _NOISE:
        chosen, rejected = rejected, chosen
    said = {"chosen": chosen, "rejected": rejected}
    return {"prompt": world.conversation(task)} | {
        name: [{"role": "assistant", "content": text}] for name, text in said.items()
    }
