"""The real world's models: sampling, and a pair made by the recipe that users would use.

`real_world` says what is asked and checks it; `smollm` brings the model; `real` measures what is built here.
"""

import glob
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from ..annotation.writers import write
from ..errors import ConfigError
from ..scoring.causal_lm import CausalLM
from ..scoring.checkpoint import identify_weights
from ..scoring.encoding import Encoder
from ..scoring.pair import Member
from . import real_world
from .cache import build_once, saving
from .models import Sample, progress
from .story import TINY_RUN, quiet_trl

RECIPE_VERSION = 2
"""Part of the cache folder's name. Raise it with every change of the tasks, the sampling or the tuning."""

_BATCH = 64  # sequences
_PER_PROMPT = 4
_PAIRS_PER_PROMPT = 2
MAX_PAIRS = 1000
"""Of a file."""
_TUNING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "beta": 0.1,
    "loss_type": ["sigmoid", "sft"],  # without the likelihood the model forgets how to write
    "loss_weights": [1.0, 0.2],
    "per_device_train_batch_size": 8,
    "max_length": 256,
}


@dataclass(frozen=True)
class Pair:
    """Two completions to one task, both written by one model; gold calls the first right and the second wrong."""

    task: real_world.Task
    right: Sample
    wrong: Sample


def load_policy(model: str | Path) -> PreTrainedModel:
    """The model as it is trained: in bfloat16, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one that has no padding token pads with the end token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those at which the model's `generate` stops."""
    stops = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id} | ({*stops} if isinstance(stops, list) else {stops} - {None}))


def make_lora() -> Any:
    """
    The adapter that the strong model and the policies are trained with: a `peft.LoraConfig`.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "the real demo trains LoRA adapters, and peft is not installed. Run: pip install peft"
        ) from error
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[real_world.Message]],
    *,
    per_prompt: int,
    seed: int,
    temperature: float = 1.0,
    label: str = "sampling",
) -> list[list[Sample]]:
    """
    Let a model write `per_prompt` completions to each prompt, at most `real_world.MAX_NEW_TOKENS` tokens long.

    The model's training mode and the global random state are as before when it returns.
    """
    policy = Member(CausalLM(model, "policy"), Encoder(tokenizer, "policy"), None)
    at_once = max(1, _BATCH // per_prompt)
    groups: list[list[Sample]] = []
    with progress() as bars:
        bar = bars.add_task(label, total=len(prompts))
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            written = write(
                policy,
                some,
                per_prompt=per_prompt,
                temperature=temperature,
                max_new_tokens=real_world.MAX_NEW_TOKENS,
                seeds=[f"{seed} {place}" for place in range(start, start + len(some))],
            )
            groups += [[Sample(one.text, bool(one.finished)) for one in group] for group in written]
            bars.advance(bar, len(some))
    return groups


def choose_pairs(
    tasks: Sequence[real_world.Task],
    groups: Sequence[Sequence[Sample]],
    *,
    per_prompt: int,
    nearest: bool = False,
    only_condition: bool = False,
) -> list[Pair]:
    """
    Pairs of a completion that gold calls right and one that it calls wrong, none in two pairs.

    Args:
        tasks, groups: Each task and what was written to it.
        per_prompt (`int`): At most so many pairs a task.
        nearest (`bool`, *optional*, defaults to `False`): To each right one the wrong one that is nearest in length,
            not the next that was written.
        only_condition (`bool`, *optional*, defaults to `False`): Of well-formed completions only, so that the two of a
            pair differ in whether they meet the condition.
    """
    pairs = []
    for task, group in zip(tasks, groups, strict=True):
        fit = [one for one in group if not only_condition or real_world.is_well_formed(task, one.text, one.finished)]
        right = [one for one in fit if real_world.gold(task, one.text, one.finished)]
        wrong = [one for one in fit if not real_world.gold(task, one.text, one.finished)]
        for one in right[:per_prompt]:
            if not wrong:
                break
            other = wrong[0]
            if nearest:
                other = min(wrong, key=lambda two: abs(len(two.text.split()) - len(one.text.split())))
            wrong.remove(other)
            pairs.append(Pair(task, one, other))
    return pairs


def build_strong(model: str, *, tasks: int, data: str | None = None, cache: bool = True) -> Path:
    """
    The model, tuned by one pass of TRL's `DPOTrainer` (LoRA) over pairs that it wrote itself and `real_world`'s checks
    told apart; or what is in the cache. A folder with merged weights in float32, and `tuning.json`.

    Args:
        model (`str`): Name or path of the weak model.
        tasks (`int`): It writes to the first so many training tasks.
        data (`str`, *optional*): A JSONL file of `prompt`, `chosen`, `rejected`: pairs to tune on in place of its own,
            at most `MAX_PAIRS`, drawn with a seed.
        cache (`bool`, *optional*, defaults to `True`): `False` builds again.

    Raises:
        ConfigError: the cache folder can't be written, the file can't be read, peft is not installed, or the model
            wrote no pair.
        ModelError: there is no such model.
    """
    adapter = make_lora()
    weights = identify_weights(model, "model")
    if data is None:
        written = build_once(_name("written", weights, tasks), partial(_write, model, tasks), cache=cache)
        path, source = written / "pairs.jsonl", str(tasks)
    else:
        path, source = Path(data), identify_data(data)
    return build_once(_name("strong", weights, source), partial(_tune, model, path, adapter), cache=cache)


def identify_data(data: str) -> str:
    """
    A hash of a file of pairs.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return hashlib.sha256(Path(data).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"data is {data!r}, which can't be read: {error.strerror}.") from error


def _name(what: str, *made_of: object) -> str:
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
    return f"real-{what}-v{RECIPE_VERSION}-{digest[:12]}"


def _write(model: str, tasks: int, folder: Path) -> None:
    """Pairs that the model writes, each of nearly one length: what is tuned on them learns more than to be brief."""
    started = time.perf_counter()
    chosen = real_world.TRAIN[:tasks]
    weak, tokenizer = load_policy(model), load_tokenizer(model)
    groups = sample(
        weak, tokenizer, [task.prompt for task in chosen], per_prompt=_PER_PROMPT, seed=0, label="weak writes"
    )
    rows = [_as_row(pair) for pair in choose_pairs(chosen, groups, per_prompt=_PAIRS_PER_PROMPT, nearest=True)]
    if not rows:
        raise ConfigError(f"{model!r} wrote no pair of a right and a wrong completion to tune strong on.")
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _say(f"weak wrote {len(rows)} pairs", started)


def _tune(model: str, pairs: Path, adapter: Any, folder: Path) -> None:
    """One pass over a file of pairs."""
    from trl import DPOConfig, DPOTrainer

    started = time.perf_counter()
    rows = _read_rows(pairs)
    tokenizer = load_tokenizer(model)
    steps = math.ceil(len(rows) / _TUNING["per_device_train_batch_size"])
    with quiet_trl(), tempfile.TemporaryDirectory() as scratch, progress() as bars:
        bar = bars.add_task("tuning strong", total=steps)
        trainer = DPOTrainer(
            model=load_policy(model),
            args=DPOConfig(output_dir=scratch, seed=0, max_steps=steps, **_TUNING, **TINY_RUN),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[_Advance(partial(bars.advance, bar))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(scratch)
        strong = _merge(model, scratch)
    about = {"pairs": len(rows), "steps": steps, "seconds": round(time.perf_counter() - started)}
    with saving(folder):
        strong.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "tuning.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    _say(f"tuned strong by DPO on {len(rows)} pairs", started)


def _read_rows(path: Path) -> Dataset:
    """At most `MAX_PAIRS` pairs of a file, drawn with a seed."""
    try:
        found = load_dataset("json", data_files=glob.escape(str(path)), split="train")
    except (DatasetsError, ValueError, StopIteration) as error:  # the last: nothing is in it
        raise ConfigError(f"data is {str(path)!r}, which is no JSONL: {error.__cause__ or 'it is empty'}.") from error
    missing = {"prompt", "chosen", "rejected"} - {*found.column_names}
    if missing:
        raise ConfigError(f"data is {str(path)!r}, which has no column {', '.join(sorted(missing))}.")
    found = found.select_columns(["prompt", "chosen", "rejected"]).shuffle(seed=0)
    return found.select(range(min(MAX_PAIRS, len(found))))


def _say(what: str, started: float) -> None:
    Console(stderr=True).print(f"{what}, {time.perf_counter() - started:.0f} s", highlight=False)


class _Advance(TrainerCallback):  # type: ignore[misc]
    """Move a progress bar with every step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance()


def _merge(model: str, adapter: str) -> PreTrainedModel:
    """The model with an adapter added to its weights as they are on disk, in float32: not to their bfloat16."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def _as_row(pair: Pair) -> dict[str, Any]:
    said = {"chosen": pair.right, "rejected": pair.wrong}
    return {"prompt": pair.task.prompt} | {
        name: [{"role": "assistant", "content": one.text}] for name, one in said.items()
    }
