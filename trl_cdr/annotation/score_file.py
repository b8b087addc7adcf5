"""A JSONL file of prompts and completions -> the same lines with their scores. Resumable; runs no model itself.

Neighbours: `cli` parses the arguments, `scoring.scorer` scores.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..config import CDRConfig
from ..errors import ConfigError, InputError
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer

_SHOWN = ("value", "strong_logps", "weak_logps", "n_tokens", "domain", "finished", "truncated", "gated", "error")


@dataclass
class ScoreArguments:
    """
    What to score, and where the scores go.

    Raises:
        ConfigError: a value is out of range.
    """

    input: str = field(
        metadata={
            "help": "JSONL file. Each line holds prompt and completion (strings or messages), and may hold finished "
            "(false: cut off, no end token) and domain. Other fields are kept."
        }
    )
    output_dir: str = field(
        default="./trl-cdr-score",
        metadata={"help": "Folder for scores.jsonl and summary.json. A run that was stopped goes on from here."},
    )
    batch_size: int = field(default=64, metadata={"help": "Rows that are scored and written at a time."})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: it counts rows. Use 1 or more.")


def score_file(arguments: ScoreArguments, config: CDRConfig) -> dict[str, Any]:
    """
    Score every line of a file.

    Args:
        arguments (`ScoreArguments`): Input and output.
        config (`CDRConfig`): The pair and its options.

    Returns:
        `dict`: what `summary.json` holds: `rows`, `scored`, `unscorable` (reason -> rows), `value.mean` (nats),
        `tokens`, `seconds`.

    Raises:
        InputError: the file does not exist, or a line is no JSON object with prompt and completion. Nothing is scored.
        ConfigError: the output folder holds scores of another input or other options.
    """
    rows = _read_rows(Path(arguments.input))
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores_path = folder / "scores.jsonl"
    done = _read_done(scores_path, rows)
    scorer = DensityRatioScorer.from_config(config)
    digest = None if scorer.criteria is None else scorer.criteria.digest  # the file that cdr_criteria names may change
    options = asdict(config) | {"criteria_sha256": digest}
    if done:
        _match_options(folder / "options.json", options)
    started = time.perf_counter()
    scorer.load()
    (folder / "options.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    with scores_path.open("a", encoding="utf-8") as out:
        batches = list(_batches(rows[len(done) :], arguments.batch_size))
        for batch in track(batches, description="scoring", console=Console(stderr=True), disable=not batches):
            for row, score in zip(batch, _score_rows(scorer, batch), strict=True):
                shown = {name: getattr(score, name) for name in _SHOWN} | {"typicality": _finite(score.typicality)}
                out.write(json.dumps({**row, "score": shown}) + "\n")
                done.append(shown)
            out.flush()
    summary = _summarise(done, time.perf_counter() - started)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print_summary(summary, scores_path)
    return summary


def _finite(value: float | None) -> float | None:
    """What JSON has a word for."""
    return value if value is not None and math.isfinite(value) else None


def _score_rows(scorer: DensityRatioScorer, rows: list[dict[str, Any]]) -> list[Score]:
    columns = {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}}
    domains = None if scorer.router is None else scorer.router.read_column(columns)
    return scorer.score(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        finished=[row.get("finished", True) for row in rows],
        domains=domains or [row.get("domain") for row in rows],
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"input is {str(path)!r}, and no such file exists. Give the path of a JSONL file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"input is {str(path)!r}, which is no UTF-8 ({error}). Convert it.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is no JSON ({error}). Write one JSON object a line.") from None
        if not isinstance(row, dict) or not {"prompt", "completion"} <= set(row):
            raise InputError(f"{path}:{number} needs the fields prompt and completion. Add them.")
        if "score" in row:
            raise InputError(f"{path}:{number} has a field score already, which would be overwritten. Rename it.")
        if row.get("finished") not in (True, False, None):
            raise InputError(f"{path}:{number} has finished: {row['finished']!r}. Use true, false or null.")
        rows.append(row)
    return rows


def _match_options(path: Path, options: dict[str, Any]) -> None:
    """Scores of different options must not end up in one file."""
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *options} if before.get(name) != options.get(name))
    if changed:
        name = changed[0]
        raise ConfigError(
            f"output_dir {str(path.parent)!r} holds scores with {name}={before.get(name)!r}, and now it is "
            f"{options.get(name)!r}. Pass another output_dir, or remove this one."
        )


def _read_done(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores that an earlier run wrote, one for each of the first rows; a torn last line is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    written = [json.loads(line) for line in whole.split(b"\n") if line]
    done = [line.pop("score") for line in written]
    if written != rows[: len(written)]:
        raise ConfigError(
            f"{str(path)!r} holds the scores of another input. Pass another output_dir, or remove this one."
        )
    if whole != text:
        path.write_bytes(whole)
    return done


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _summarise(scores: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    values = [score["value"] for score in scores if score["value"] is not None]
    return {
        "rows": len(scores),
        "scored": len(values),
        "unscorable": dict(Counter(score["error"] for score in scores if score["error"] is not None)),
        "value": {"mean": sum(values) / len(values) if values else None},
        "tokens": sum(score["n_tokens"] for score in scores),
        "seconds": round(seconds, 3),
    }


def _print_summary(summary: dict[str, Any], path: Path) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rows scored", f"{summary['scored']} of {summary['rows']}")
    mean = summary["value"]["mean"]
    table.add_row("mean log-ratio", "-" if mean is None else f"{mean:+.3f} nats")
    table.add_row("completion tokens", f"{summary['tokens']:,}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    for reason, count in summary["unscorable"].items():
        table.add_row(f"unscorable ({count})", reason)
    table.add_row("written to", str(path))
    Console().print(table)
