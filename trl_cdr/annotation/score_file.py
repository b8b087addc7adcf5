"""`trl-cdr score`: rows of a prompt and a completion -> the same rows with their scores, as Parquet. Runs no model.

Neighbours: `cli` parses the arguments, `scoring.scorer` scores, `pipeline` reads, shards and resumes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..config import CDRConfig
from ..errors import InputError
from ..scoring.scorer import DensityRatioScorer
from ..scoring.string_prompts import count_strings, describe_strings
from .pair_options import check_router, known_options, loaded_options, row_domains
from .pipeline import Job, RunArguments, open_input, run
from .reader import Check, OnBadRow, Row, Source, needs, read_rows
from .score_folder import SUMMARY, fix_date
from .shards import Counts, Labelled

_AT_ONCE = 1000  # rows whose types are looked at
_NEEDS = needs("prompt", "completion")
_SCORE = pa.struct(
    [
        *((name, pa.float64()) for name in ("value", "strong_logps", "weak_logps")),
        ("n_tokens", pa.int64()),
        ("domain", pa.string()),
        *((name, pa.bool_()) for name in ("finished", "truncated")),
        *((name, pa.float64()) for name in ("surprise", "survival", "typicality")),
        ("gated", pa.bool_()),
        ("error", pa.string()),
    ]
)
_ABOUT = (
    "Completions and their scores: the log-density ratio of a strong over a weak model, "
    "log p_strong(y | c, x) - log p_weak(y | c, x), nats ([arXiv 2411.02481](https://arxiv.org/abs/2411.02481))."
)


@dataclass
class ScoreArguments(RunArguments):
    """What to score, and where the scores go."""

    input: str = field(
        metadata={
            "help": "A .jsonl (or .jsonl.gz, .parquet, .json, .csv) file, a folder of such, or a name on the Hub. Each "
            "row holds prompt and completion (strings or messages), and may hold finished (false: cut off, no end "
            "token) and domain. Other fields are kept."
        }
    )
    output_dir: str = field(
        default="./trl-cdr-score",
        metadata={"help": "Folder for the scores. A run that was stopped, however, goes on from here."},
    )


def score_file(arguments: ScoreArguments, config: CDRConfig, *, data: Dataset | None = None) -> dict[str, Any] | None:
    """
    Score every row of a file or data set: `data/*.parquet` and `summary.json` in the output folder.

    Args:
        arguments (`ScoreArguments`): Input and output.
        config (`CDRConfig`): The pair and its options.
        data (`Dataset`, *optional*): Rows from memory in place of `arguments.input`, which is then their name.

    Returns:
        `dict` or `None`: what `summary.json` holds: `rows`, `scored`, `unscorable` (reason -> rows), `value.mean`
        (nats), `tokens`, `string_prompts` (how strings were read -> rows), `bad_rows`; `None` while other machines or
        processes have shards to write.

    Raises:
        InputError: the input can't be read, or a row has no prompt and completion. Nothing is scored.
        ConfigError: see `pipeline.run`.
        ModelError: see `DensityRatioScorer`.
    """
    source = open_input(arguments, data)
    scorer = DensityRatioScorer.from_config(fix_date(config, Path(arguments.output_dir)))
    check_router(scorer, source)
    job = Job(
        command="score",
        options=known_options(scorer),
        check=_check,
        schema=lambda: find_schema(source, check=_check, on_bad_row=arguments.on_bad_row).append(
            pa.field("score", _SCORE)
        ),
        load=lambda: loaded_options(scorer),
        label=partial(_label, scorer),
        summarise=_summarise,
        show=_show,
        about=_ABOUT,
    )
    return run(arguments, source, job)


def find_schema(source: Source, *, check: Check, on_bad_row: OnBadRow) -> pa.Schema:
    """
    The types of all fields of a source's rows: the narrowest that hold what is there.

    Args:
        source (`Source`): All of it is read.
        check (`Check`), on_bad_row (`str`): Which rows count; see `reader.sift`.

    Raises:
        InputError: a field is of kinds that no one type holds, such as strings here and messages there.
    """
    rows = read_rows(source, check=check, on_bad_row=on_bad_row)
    types: dict[str, pa.DataType] = {}
    for some in _chunks(rows):
        for name in dict.fromkeys(name for row in some for name in row.fields):
            try:
                found = pa.array([row.fields.get(name) for row in some]).type
                types[name] = _widen(types.get(name, pa.null()), found)
            except (pa.ArrowException, OverflowError) as error:
                raise InputError(
                    f"{some[0].where} to {some[-1].where}: {name} is of several kinds ({error}), here or beside what "
                    "stands before, and a column has one. Give it one, or leave it out."
                ) from None
    for name, kind in types.items():
        if _is_empty(kind):
            raise InputError(
                f"{source.name}: {name} holds an empty object and never another, which no column can. Leave it out, or "
                "write null."
            )
    return pa.schema(types.items())


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while some := list(islice(rows, _AT_ONCE)):
        yield some


def _widen(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds the values of both."""
    schemas = [pa.schema([("", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _is_empty(kind: pa.DataType) -> bool:
    """Whether a type is a struct without fields, or holds one."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_is_empty(kind.field(number).type) for number in range(kind.num_fields))


def _check(fields: Mapping[str, Any]) -> str | None:
    if "score" in fields:
        return "has a field score already, which would be overwritten. Rename it."
    return _NEEDS(fields)


def _label(scorer: DensityRatioScorer, rows: Sequence[Row]) -> Labelled:
    given = [row.fields["prompt"] for row in rows]
    completions = [row.fields["completion"] for row in rows]
    prompts = scorer.read_prompts(given, completions)
    scores = scorer.score(
        prompts,
        completions,
        finished=[row.fields.get("finished") is not False for row in rows],
        domains=row_domains(scorer, rows),
    )
    values = [score.value for score in scores if score.value is not None]
    reasons: dict[str, float] = {}
    for score in scores:
        if score.error is not None:
            reasons[score.error] = reasons.get(score.error, 0) + 1
    counts = {"rows": len(rows), "scored": len(values), "value": sum(values), "tokens": sum(s.n_tokens for s in scores)}
    return Labelled(
        rows=[
            {**row.fields, "score": {each.name: getattr(score, each.name) for each in _SCORE}}
            for row, score in zip(rows, scores, strict=True)
        ],
        counts={"all": counts, "unscorable": reasons, "string_prompts": count_strings(given, prompts)},
    )


def _summarise(counts: Counts) -> dict[str, Any]:
    found = counts.get("all", {})
    scored = int(found.get("scored", 0))
    return {
        "rows": int(found.get("rows", 0)),
        "scored": scored,
        "unscorable": {reason: int(count) for reason, count in counts.get("unscorable", {}).items()},
        "value": {"mean": found["value"] / scored if scored else None},
        "tokens": int(found.get("tokens", 0)),
        "string_prompts": {meaning: int(count) for meaning, count in counts.get("string_prompts", {}).items()},
    }


def _show(summary: Mapping[str, Any], folder: Path) -> None:
    mean = summary["value"]["mean"]
    lines = [
        ("rows scored", f"{summary['scored']} of {summary['rows']}"),
        ("mean log-ratio", "-" if mean is None else f"{mean:+.3f} nats"),
        ("completion tokens", f"{summary['tokens']:,}"),
        *(("prompts", line) for line in describe_strings(summary["string_prompts"])),
        *((f"unscorable ({count})", reason) for reason, count in summary["unscorable"].items()),
        ("written to", str(folder / "data")),
    ]
    if summary["bad_rows"]["count"]:
        lines.insert(1, ("rows left out", f"{summary['bad_rows']['count']}, see {SUMMARY}"))
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:{width}}  {text}")
