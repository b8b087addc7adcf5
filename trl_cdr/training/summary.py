"""A finished run's log -> the table that closes `trl-cdr train`. Reads what was logged; measures nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import _compat
from .reward_functions import reward_name

# Where trainers log the mean reward and the completions' mean length; online DPO has only the pair's own count.
_REWARDS = ("reward", "objective/scores")
_LENGTHS = ("completions/mean_length", "{name}/tokens")


def print_summary(trainer: Any, *, kind: str) -> None:
    """
    Print on stdout what a run came to, and where everything is.

    Args:
        trainer (`Trainer`): After training and saving.
        kind (`str`): Its name, such as `"grpo"`.
    """
    functions = _compat.reward_functions(trainer)
    history = trainer.state.log_history
    table = Table(box=None, pad_edge=False)
    for heading in ("", "first log", "last log"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in changes(
        history,
        rewards=[reward_name(function) for function in functions],
        objectives=[reward.config.cdr_name for reward in map(_compat.cdr_reward, functions) if reward is not None],
    ):
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(f"\n{trainer.state.global_step} steps of {kind}{_duration(history)}", markup=False, highlight=False)
    console.print(table, markup=False)
    console.print()
    for name, place in places(Path(trainer.args.output_dir), trainer.args.report_to):
        console.print(f"{name:13}{place}", markup=False, highlight=False)  # no table: that would cut long paths


def changes(
    history: Sequence[Mapping[str, Any]], *, rewards: Sequence[str], objectives: Sequence[str]
) -> list[tuple[str, str, str]]:
    """
    What was logged first and last of what tells a run's success.

    Args:
        history (`Sequence[Mapping]`): `trainer.state.log_history`.
        rewards (`Sequence[str]`): The names of the reward functions.
        objectives (`Sequence[str]`): `cdr_name` of those that are [`CDRReward`].

    Returns:
        `list[tuple[str, str, str]]`: label, first and last value, of what was logged at all (None, of an interval
        without a value, is not). What was logged once is the last.
    """
    wanted: list[tuple[str, tuple[str, ...], str]] = [("reward", _REWARDS, "{:+.3f}")]
    if len(rewards) > 1:
        wanted += [(f"  {name}", (f"rewards/{name}/mean",), "{:+.3f}") for name in rewards]
    wanted.append(("reward, held out", ("eval_reward",), "{:+.3f}"))
    for name in objectives:
        wanted.append(("gated" if len(objectives) == 1 else f"gated, {name}", (f"{name}/gated",), "{:.1%}"))
    wanted.append(("tokens a completion", tuple(key.format(name=objectives[0]) for key in _LENGTHS), "{:.1f}"))
    rows = []
    for label, keys, form in wanted:
        logged = ([entry[key] for entry in history if entry.get(key) is not None] for key in keys)
        values = [form.format(value) for value in next(filter(None, logged), [])]
        if values:
            rows.append((label, values[0] if len(values) > 1 else "", values[-1]))
    return rows


def places(folder: Path, report_to: Sequence[str] = ()) -> list[tuple[str, str]]:
    """
    Where a run's results are: label and place.

    Args:
        folder (`Path`): Its `output_dir`.
        report_to (`Sequence[str]`, *optional*): Integrations that hold the log too.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    last = max((int(step) for step in steps if step.isdigit()), default=None)
    found = [("model", str(folder))]
    if last is not None:
        found.append(("checkpoints", f"{len(steps)}, the last {folder / f'checkpoint-{last}'}"))
    if (folder / "completions").is_dir():
        found.append(("completions", str(folder / "completions")))
    return [*found, ("log", ", ".join([str(folder / "trainer_state.json"), *report_to]))]


def _duration(history: Sequence[Mapping[str, Any]]) -> str:
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds[-1]), 60)
    return f" in {minutes // 60}:{minutes % 60:02}:{rest:02}"
