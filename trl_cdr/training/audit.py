"""`trl-cdr audit`: a run's log -> did its policy game the reward? The rule is `monitor`'s; this reads files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import InputError
from .monitor import Monitor, names_in

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Audit:
    """
    What a run's log says.

    Attributes:
        path (`Path`): The file that was read.
        monitors (`dict[str, Monitor]`): By the `cdr_name` of each reward, after the whole log.
        later (`Path` or `None`): A log of the folder that was written after it, and does not go as far: of a run that
            went back to a checkpoint, or began anew. (Copying a folder may change what was written when.)
    """

    path: Path
    monitors: dict[str, Monitor]
    later: Path | None = None

    @property
    def is_alarming(self) -> bool:
        """Whether there is an alarm for any of the rewards."""
        return any(monitor.alarm is not None for monitor in self.monitors.values())


def audit(folder: str | Path) -> Audit:
    """
    Judge the log of a run, going on or finished, by the rule that `CDRCallback` applies while it goes on.

    Args:
        folder (`str` or `Path`): The run's `output_dir`, or one of its checkpoints. Read is the `trainer_state.json` of
            the folder or of its last checkpoint, whichever goes further.

    Raises:
        InputError: there is no log, or none that can be read; it lacks the metrics of a [`CDRReward`], or they end
            before anything can be said of one of the rewards.
    """
    path, history, later = _find(Path(folder))
    names = names_in(history)
    if not names:
        raise InputError(
            f"{path} holds no metrics of a CDRReward (cdr/tokens, ...) in {len(history)} logs. Train with "
            "logging_steps, and with CDRCallback in online DPO."
        )
    monitors = {name: Monitor(name) for name in names}
    for entry in history:
        for monitor in monitors.values():
            monitor.read(entry)
    for name, monitor in monitors.items():
        if not monitor.is_judged:
            raise InputError(
                f"{path} is too short to judge {name}: {monitor.n_readings} of its logs hold the metrics, as finite "
                "numbers. A verdict takes the first 10 steps (three logs at least) and three logs after them."
            )
    return Audit(path, monitors, later)


def print_audit(found: Audit) -> None:
    """Print the figures and a verdict on each reward."""
    table = Table(box=None, pad_edge=False)
    for heading in ("nats a token", "first steps", "last steps", "at the alarm"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, monitor in found.monitors.items():
        alarm = monitor.alarm and monitor.alarm.last
        for label, key in (("text costs the strong model", "cost"), ("log-ratio", "gain")):
            cells = ["" if one is None else f"{getattr(one, key):.3f}" for one in (monitor.first, monitor.last, alarm)]
            table.add_row(f"{name}: {label}", *cells)
    console = Console(soft_wrap=True)
    console.print(f"{found.path}", markup=False, highlight=False)
    console.print(table, markup=False)
    for name, monitor in found.monitors.items():
        verdict = "no alarm" if monitor.alarm is None else f"ALARM at step {monitor.alarm.step}: {monitor.alarm.reason}"
        console.print(f"{name}: {verdict}", markup=False, highlight=False)
    if found.later is not None:
        console.print(
            f"{found.later} was written later, and does not go as far. Where the run went back to a checkpoint, or "
            "began anew, judge that file: copy it into a folder of its own.",
            markup=False,
            highlight=False,
        )


def _find(folder: Path) -> tuple[Path, list[dict[str, Any]], Path | None]:
    """The log that goes furthest, where it is, and another one that was written later."""
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder. Pass the output_dir of a run, or a checkpoint.")
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{_STATE}") if _number(path.parent) is not None]
    checkpoints.sort(key=lambda path: _number(path.parent) or 0)
    files = [path for path in (folder / _STATE, *checkpoints[-1:]) if path.is_file()]
    if not files:
        raise InputError(
            f"{str(folder)!r} holds no {_STATE}, and no checkpoint that does. Pass the output_dir of a run that has "
            "saved one (trl-cdr train does; else save_strategy, or trainer.save_state())."
        )
    found = [(path, _read(path)) for path in files]
    path, history = max(found, key=lambda item: max((entry.get("step") or 0 for entry in item[1]), default=0))
    last = max((*files, *checkpoints), key=lambda file: file.stat().st_mtime_ns)
    return path, history, last if last.stat().st_mtime_ns > path.stat().st_mtime_ns else None


def _number(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}. Pass a checkpoint that was saved whole.") from None
    except (KeyError, TypeError):
        history = None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise InputError(f"{path} has no log_history, a list of logs. Pass the output_dir of a trainer.")
    return history
