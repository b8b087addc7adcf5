"""The completions table of `OnlinePreferenceTrainer`: GRPO's without the column `advantage`, which pairs do not have.

Lays rows out and hands them on; the trainer gathers them.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from .completions_table import as_text

_TRACKERS = ("wandb", "trackio")  # the reporting integrations to which GRPO sends its table


def write_table(
    columns: Mapping[str, Sequence[Any]], folder: Path, *, step: int, trackers: Sequence[str], unique_prompts: bool
) -> None:
    """
    Keep a table of completions as `completions_<step>.parquet`, and send it to trackers.

    Args:
        columns (`Mapping[str, Sequence[Any]]`): One value of each for a completion; `prompt` is among them.
        folder (`Path`): Where to; made where it is missing.
        step (`int`): The step of the trainer.
        trackers (`Sequence[str]`): The trainer's `report_to`.
        unique_prompts (`bool`): Send trackers one row to a prompt.
    """
    table = Dataset.from_dict({"step": [step] * len(columns["prompt"]), **columns})
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"completions_{step:05d}.parquet")
    frame = table.to_pandas()
    if unique_prompts:
        frame = frame[~frame["prompt"].astype(str).duplicated()]
    for name in _TRACKERS:
        if name in trackers and (tracker := import_module(name)) and getattr(tracker, "run", True) is not None:
            tracker.log({"completions": tracker.Table(dataframe=frame)})


def print_table(columns: Mapping[str, Sequence[Any]], *, step: int, rows: int | None) -> None:
    """Print a table of completions, the last `rows` of it, or all."""
    table = Table(*columns, title=f"Step {step}", show_lines=True)
    every = list(zip(*columns.values(), strict=True))
    for row in every if rows is None else every[max(0, len(every) - rows) :]:
        table.add_row(*map(_cell, row))
    Console().print(table, markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return as_text(value) if isinstance(value, list) else str(value)  # messages
