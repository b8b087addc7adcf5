"""Rows that another judge has scored, such as those that RewardBench publishes -> compared with ours, row by row."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .accuracy import average
from .preferences import Preference
from .reader import open_source, read_rows
from .rewardbench import credit


def read_baseline(path: str) -> dict[str, float]:
    """
    What another judge earned: by id 1 for the better completion preferred, 0 for the other, shares for ties.

    Args:
        path (`str`): A JSON file with columns, as in `allenai/reward-bench-results`, or JSONL or Parquet with rows, as
            `trl-cdr evaluate` writes. `id`, and `scores_chosen` and `scores_rejected` (numbers or lists), or `results`.

    Raises:
        InputError: it can't be read, or a row has neither.
    """
    found = {}
    for where, fields in _read(path):
        try:
            earned = _earned(fields)
        except (TypeError, ValueError):  # what stands there is no number
            earned = None
        if fields.get("id") is None or earned is None:
            raise InputError(
                f"{where} needs the fields id, and scores_chosen with scores_rejected, or results. Give the rows of "
                "another judge."
            )
        found[str(fields["id"])] = earned
    if not found:
        raise InputError(f"baseline is {path!r}, which has no rows. Give the rows of another judge.")
    return found


def compare_rows(
    rows: Sequence[Mapping[str, Any]],
    preferences: Sequence[Preference],
    baseline: Mapping[str, float],
    *,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Compare what two judges earned, on the rows that both have.

    Args:
        rows (`Sequence[Mapping]`): Ours: `id`, `subset`, `domain`, `results`.
        preferences (`Sequence[Preference]`): Of the data; those that are labelled are the rows.
        baseline (`Mapping[str, float]`): By id what the other one earned.
        seed (`int`): Of the intervals.

    Returns:
        `tuple`: `rows` (of both), `missing` (ours that it lacks), `ours`, `theirs` and `lead` (means of domains,
        `[mean, low, high]`), `won` and `lost` (rows in which one earned more); and these rows: `id`, `subset`, `ours`,
        `theirs`.

    Raises:
        InputError: no id is in both.
    """
    labelled = [one for one in preferences if one.is_labelled]
    both = [place for place, row in enumerate(rows) if row["id"] in baseline]
    if not both:
        ids = f"{rows[0]['id']!r} here, {next(iter(baseline))!r} there"
        raise InputError(f"baseline has no row of the data's: {ids}. Give the data the ids that it was published with.")
    ours = np.array([rows[place]["results"] for place in both])
    theirs = np.array([baseline[rows[place]["id"]] for place in both])
    means = average(np.stack([ours, theirs, ours - theirs]), [labelled[place] for place in both], seed=seed)
    differing = [
        {"id": rows[place]["id"], "subset": rows[place]["subset"], "ours": float(one), "theirs": float(other)}
        for place, one, other in zip(both, ours, theirs, strict=True)
        if one != other
    ]
    summary = {
        "rows": len(both),
        "missing": len(rows) - len(both),
        **{name: each["mean"] for name, each in zip(("ours", "theirs", "lead"), means, strict=True)},
        "won": int((ours > theirs).sum()),
        "lost": int((ours < theirs).sum()),
    }
    return summary, differing


def _read(path: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Rows, each with its place."""
    if Path(path).suffix != ".json":
        return ((row.where, row.fields) for row in read_rows(open_source(Path(path), split="train", subset=None)))
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"baseline is {path!r}, which can't be read: {error}. Give a JSON or JSONL file.") from None
    if isinstance(content, list):
        return ((f"{path}, row {place}", row if isinstance(row, dict) else {}) for place, row in enumerate(content))
    columns = {name: _values(column) for name, column in content.items()} if isinstance(content, dict) else {}
    count = len(columns.get("id", []))
    return (
        (f"{path}, row {place}", {name: column[place] for name, column in columns.items() if len(column) == count})
        for place in range(count)
    )


def _values(column: Any) -> list[Any]:
    """A column as JSON has it: a list, or values by their place; nothing of what is said of the whole file."""
    if isinstance(column, dict):
        return list(column.values())
    return column if isinstance(column, list) else []


def _earned(fields: Mapping[str, Any]) -> float | None:
    sides = [fields.get("scores_chosen"), fields.get("scores_rejected")]
    if None not in sides:
        chosen, rejected = (_numbers(side) for side in sides)
        return credit(chosen, rejected) if chosen and rejected else None
    scores, count = fields.get("scores"), fields.get("num_correct", 1)
    if isinstance(scores, list) and isinstance(count, int) and 0 < count < len(scores):  # RewardBench 2
        return credit(_numbers(scores[:count]), _numbers(scores[count:]))
    results = fields.get("results")
    return float(results) if isinstance(results, (int, float)) else None


def _numbers(side: Any) -> list[float]:
    """A number, or several, each maybe in a list of its own."""
    return [
        float(value[0] if isinstance(value, list) else value) for value in (side if isinstance(side, list) else [side])
    ]
