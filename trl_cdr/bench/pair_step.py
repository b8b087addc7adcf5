"""What a preference loss costs: one forward and backward pass over the same pairs, ours beside TRL's trainers.

Generation and rewards are not part of it. Each trainer is built, measured and let go by itself, so that its memory is
its own; weights are not counted, gradients are.
"""

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from trl import DPOConfig, DPOTrainer

from .. import _compat
from ..training.online_preference_config import OnlinePreferenceConfig
from ..training.online_preference_trainer import OnlinePreferenceTrainer
from .measure import describe_machine, measure
from .workloads import build_model

Step = Callable[[], float]  # forward and backward; returns the loss

PAIRS, PROMPT, COMPLETION = 2, 64, 128  # pairs; tokens of a prompt and of each completion, its end token among them
BETA, GAMMA = 2.0, 1.0  # SimPO's


def run_pair_step(model: str, name: str | None, *, dtype: str, attention: str, runs: int = 5) -> dict[str, Any]:
    """
    Measure the step of SimPO and of DPO, each our way and TRL's.

    Args:
        model (`str`): One of `MODELS`, built with random weights, if there is no name.
        name (`str` or `None`): The policy (name or path) in its place.
        dtype (`str`): `"auto"` is float32 on the CPU and bfloat16 on a GPU.
        attention (`str`): Attention implementation.
        runs (`int`, *optional*, defaults to 5): Runs after the first; seconds are their median.

    Returns:
        `dict`: `workload`, `machine`, `dtype`, `rows`, and `cases`, for each `label`, `loss` (of the first run; equal
        for one loss), `peak_mb` (above the weights) and `seconds`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        if name is None:
            name = str(Path(scratch) / "policy")
            torch_dtype = getattr(torch, dtype)
            build_model(model, seed=0, device=device, dtype=torch_dtype, attention=attention).save_pretrained(name)
        tokenizer = _build_tokenizer(AutoConfig.from_pretrained(name).vocab_size)
        rows = _draw_rows(len(tokenizer) - 2)
        settings = {
            "output_dir": scratch,
            "use_cpu": device == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": dtype, "attn_implementation": attention},
        }
        ways: dict[str, Callable[[], Step]] = {
            "SimPO, ours": lambda: _ours(
                name, rows, tokenizer, preference_loss="simpo", preference_beta=BETA, gamma=GAMMA, **settings
            ),
            "SimPO, TRL's CPOTrainer": lambda: _cpo(name, rows, tokenizer, **settings),
            "DPO, ours": lambda: _ours(name, rows, tokenizer, preference_loss="dpo", **settings),
            "DPO, TRL's DPOTrainer": lambda: _dpo(name, rows, tokenizer, **settings),
        }
        cases = [_measure(label, build(), device=device, runs=runs) for label, build in ways.items()]
    return {
        "workload": "pair_step",
        "machine": describe_machine(device),
        "dtype": dtype,
        "rows": f"{PAIRS} pairs, prompts of {PROMPT} tokens, completions of {COMPLETION}",
        "cases": cases,
    }


def print_pair_step(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    machine = result["machine"]
    table = Table(title=f"pair_step: {result['rows']}; {result['dtype']}", title_justify="left")
    for heading in ("step", "loss", "peak MB", "seconds"):
        table.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=True)
    for case in result["cases"]:
        table.add_row(case["label"], f"{case['loss']:.4f}", f"{case['peak_mb']:,.0f}", f"{case['seconds']:.3g}")
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(
        f"Peak above the weights. {machine['device']}, {machine['threads']} threads; torch {machine['torch']}, "
        f"transformers {machine['transformers']}.",
        soft_wrap=True,
    )


def _measure(label: str, step: Step, *, device: str, runs: int) -> dict[str, Any]:
    losses: list[float] = []
    cost = measure({label: lambda: losses.append(step())}, device=device, runs=runs)[label]
    return {"label": label, "loss": losses[0], "peak_mb": cost.peak_mb, "seconds": cost.warm}


def _ours(name: str, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Step:
    trainer = OnlinePreferenceTrainer(
        name,
        lambda prompts, **_: [0.0] * len(prompts),
        OnlinePreferenceConfig(num_generations=2, per_device_train_batch_size=2 * PAIRS, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def encode(*columns: str) -> torch.Tensor:
        ids = [[tokenizer(row[column]).input_ids for column in columns] for row in rows]
        return torch.tensor(ids, device=trainer.accelerator.device)

    prompts, pairs = encode("prompt", "prompt"), encode("chosen", "rejected")
    pairs = torch.cat([pairs, torch.full_like(pairs[..., :1], tokenizer.eos_token_id)], dim=2)
    inputs = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": pairs}
    inputs |= {name: torch.ones_like(pairs) for name in ("completion_mask", "loss_mask")}
    return _step(trainer, inputs | {"weights": torch.ones(len(rows), device=pairs.device)})


def _dpo(name: str, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Step:
    args = DPOConfig(per_device_train_batch_size=PAIRS, max_length=None, **options)
    trainer = DPOTrainer(name, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return _step(trainer, _batch(trainer))


def _cpo(name: str, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Step:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA, "simpo_gamma": GAMMA}
    args = CPOConfig(per_device_train_batch_size=PAIRS, max_length=PROMPT + COMPLETION, **loss, **options)
    trainer = CPOTrainer(name, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return _step(trainer, _batch(trainer))


def _batch(trainer: Any) -> Any:
    trainer.model.train()
    return _compat.prepare_inputs(trainer, next(iter(trainer.get_train_dataloader())))


def _step(trainer: Any, inputs: Any) -> Step:
    def step() -> float:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return float(loss.detach())

    return step


def _build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One whose every token is a word, so that a text has the number of tokens that is wanted."""
    words = [*(f"w{number}" for number in range(vocab_size - 2)), "<end>", "<pad>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def _draw_rows(words: int) -> list[dict[str, str]]:
    """Random preference data; the same in every run."""
    rng = random.Random(0)

    def draw(count: int) -> str:
        return "".join(f" w{rng.randrange(words)}" for _ in range(count))

    lengths = {"prompt": PROMPT, "chosen": COMPLETION - 1, "rejected": COMPLETION - 1}  # and the end
    return [{column: draw(count) for column, count in lengths.items()} for _ in range(PAIRS)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without TRL's progress bars, and without what it warns of and no user of a benchmark can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trl.experimental")
        # TRL 1.16 uses the names that transformers 5.23 renamed to activation_checkpointing; drop when TRL follows.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
        datasets.disable_progress_bars()
        disable_progress_bar()
        try:
            yield
        finally:
            datasets.enable_progress_bars()
            enable_progress_bar()
