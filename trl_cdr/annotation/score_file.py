"""A JSONL file of prompts and completions -> the same lines with their scores. Resumable; runs no model itself.

Neighbours: `cli` parses the arguments, `scoring.scorer` scores, `score_folder` knows what an earlier run has left.
"""

import hashlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..config import CDRConfig, shareable_options
from ..errors import ConfigError
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from ..scoring.sources import find_sources
from .rows import read_rows
from .score_folder import Done, check_options, hold, read_done, write_json

_SHOWN = (
    *("value", "strong_logps", "weak_logps", "n_tokens", "domain", "finished", "truncated"),
    *("surprise", "survival", "gated", "error"),
)


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
        ConfigError: the output folder is in use, can't be written, or holds scores of another input, other weights or
            other options, or lines that are no scores.
        ModelError: see `DensityRatioScorer`.
    """
    rows = read_rows(Path(arguments.input), fields=("prompt", "completion"), reserved=("score",))
    folder = Path(arguments.output_dir)
    scorer = DensityRatioScorer.from_config(config)
    if scorer.router is not None and rows:
        scorer.router.check_column({name for row in rows for name in row}, where=f"input {arguments.input!r}")
    started = time.perf_counter()
    with hold(folder):
        done = read_done(folder / "scores.jsonl", rows, fields={*_SHOWN}, batch_size=arguments.batch_size)
        options = _read_options(scorer)
        check_options(folder, options)
        if len(done.scores) < len(rows):
            described = scorer.describe()  # loads the pair
            options |= {f"{role}_dtype": described[role]["dtype"] for role in ("strong", "weak")}
            check_options(folder, options)
            write_json(folder / "options.json", options)
            _append_scores(folder / "scores.jsonl", scorer, rows, done, batch_size=arguments.batch_size)
        summary = _summarise(done.scores, time.perf_counter() - started)
        write_json(folder / "summary.json", summary)
    _print_summary(summary, folder / "scores.jsonl")
    return summary


def _read_options(scorer: DensityRatioScorer) -> dict[str, Any]:
    """What the scores will depend on, as far as it is known without the models."""
    config = scorer.config
    init_kwargs: Any = config.cdr_model_init_kwargs
    template = config.cdr_chat_template
    return {
        **shareable_options(config),
        **{
            f"{role}_weights": source.identify(role, init_kwargs=init_kwargs)
            for role, source in find_sources(config).items()
        },
        "criteria_sha256": None if scorer.criteria is None else scorer.criteria.digest,
        "chat_template_sha256": None if template is None else hashlib.sha256(Path(template).read_bytes()).hexdigest(),
    }


def _append_scores(
    path: Path, scorer: DensityRatioScorer, rows: list[dict[str, Any]], done: Done, *, batch_size: int
) -> None:
    """Score what is left, and write it batch by batch behind what is done; `done.scores` grows with it."""
    left = rows[len(done.scores) :]
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    with path.open("a", encoding="utf-8") as out:
        out.truncate(done.bytes)
        for batch in track(batches, description="scoring", console=Console(stderr=True)):
            for row, score in zip(batch, _score_rows(scorer, batch), strict=True):
                shown = {name: getattr(score, name) for name in _SHOWN} | {"typicality": _finite(score.typicality)}
                out.write(json.dumps({**row, "score": shown}) + "\n")
                done.scores.append(shown)
            out.flush()


def _finite(value: float | None) -> float | None:
    """What JSON has a word for."""
    return value if value is not None and math.isfinite(value) else None


def _score_rows(scorer: DensityRatioScorer, rows: list[dict[str, Any]]) -> list[Score]:
    column = None if scorer.router is None else scorer.router.column
    domains = None if column is None else [row.get(column) for row in rows]
    return scorer.score(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        finished=[row.get("finished", True) for row in rows],
        domains=domains or [row.get("domain") for row in rows],
    )


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
    mean = summary["value"]["mean"]
    lines = [
        ("rows scored", f"{summary['scored']} of {summary['rows']}"),
        ("mean log-ratio", "-" if mean is None else f"{mean:+.3f} nats"),
        ("completion tokens", f"{summary['tokens']:,}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        *((f"unscorable ({count})", reason) for reason, count in summary["unscorable"].items()),
        ("written to", str(path)),
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:{width}}  {text}")
