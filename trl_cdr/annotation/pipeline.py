"""A stream of rows -> shards of labelled rows: which process takes which, what is left to do, progress, the end.

`score_file` and `annotate` say what becomes of a row; `reader` reads, `shards` writes. Knows no model.

Nothing is shared between processes but the folder: a worker takes every n-th shard, and whoever sees that all of them
are there finishes the whole. So no process waits for another, and any scheduler can start them.
"""

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .. import _compat
from ..errors import ConfigError, InputError
from .card import push, write_card
from .reader import Check, OnBadRow, Row, Source, check_on_bad_row, open_source, sift
from .score_folder import OPTIONS, SUMMARY, check_options, check_ours, hold, write_json, writing
from .shards import Counts, Labelled, Shards, add_counts

_LISTED = 100  # bad rows that a summary names


@dataclass
class RunArguments:
    """
    Where rows come from and go to, and who takes which.

    Raises:
        ConfigError: a value is out of range.
    """

    input: str
    output_dir: str
    batch_size: int = field(default=64, metadata={"help": "Rows of the input that are worked on at a time."})
    split: str = field(default="train", metadata={"help": "Which split of the input, where it has several."})
    subset: str | None = field(default=None, metadata={"help": "Which subset of a data set on the Hub."})
    shard_size: int = field(
        default=512,
        metadata={"help": "Rows of the input for each file that is written: the most that a killed process can lose."},
    )
    shard: str = field(
        default="0/1",
        metadata={"help": "i/n: this machine takes the i-th of n shares, counted from 0. Each reads the same input."},
    )
    on_bad_row: OnBadRow = field(
        default="raise",
        metadata={"help": "raise: a row that can't be used is an error before anything is scored. skip: it is listed."},
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Name of a data set on the Hub that gets the finished one. A new one is private."},
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it counts rows. Use 1 or more.")
        check_on_bad_row(self.on_bad_row)
        self.share  # noqa: B018 - raises

    @property
    def share(self) -> tuple[int, int]:
        """`shard` as two numbers."""
        number, _, count = str(self.shard).partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise ConfigError(f"shard is {self.shard!r}. Write i/n with 0 <= i < n: 0/4 to 3/4 on four machines.")
        return int(number), int(count)


@dataclass(frozen=True)
class Job:
    """
    What a command makes of rows.

    Attributes:
        command (`str`): Its name.
        options (`Mapping`): What the result depends on, beside the input; see `score_folder.check_options`.
        check (`Check`): What a row has to hold.
        schema (`Callable`): -> the schema of what is written.
        load (`Callable`): Loads what `label` needs -> options that are not known before.
        label (`Callable`): Rows -> what comes of them.
        summarise (`Callable`): The counts of all shards -> what is said of the whole, as JSON takes it.
        show (`Callable`): Prints that.
        about (`str`): The first lines of the data card.
    """

    command: str
    options: Mapping[str, Any]
    check: Check
    schema: Callable[[], pa.Schema]
    load: Callable[[], Mapping[str, Any]]
    label: Callable[[Sequence[Row]], Labelled]
    summarise: Callable[[Counts], dict[str, Any]]
    show: Callable[[Mapping[str, Any], Path], None]
    about: str


def open_input(arguments: RunArguments, data: Dataset | Mapping[str, Dataset] | None) -> Source:
    """
    The rows that a run reads: those of `data`, else of `input`, which is their name in any case.

    Raises:
        InputError, ConfigError: see `reader.open_source`.
    """
    found = open_source(arguments.input if data is None else data, split=arguments.split, subset=arguments.subset)
    return replace(found, name=arguments.input)


def run(arguments: RunArguments, source: Source, job: Job) -> dict[str, Any] | None:
    """
    Do a worker's share of a job, and finish the whole if nothing else is missing.

    Args:
        arguments (`RunArguments`): Where to, and which share.
        source (`Source`): The input.
        job (`Job`): What is done.

    Returns:
        `dict` or `None`: what `job.summarise` says of the whole, and `bad_rows`; `None` while shards of other workers
            are missing.

    Raises:
        InputError: the input is empty, or a row is bad and `on_bad_row="raise"`: nothing is scored then, unless it
            took scoring to find out.
        ConfigError: the folder is in use or none of ours, can't be written, or holds the result of another input or of
            other options; or `push_to_hub` fails, which takes nothing from the folder.
    """
    if not source.num_rows:
        raise InputError(f"input is {source.name!r}, which has no rows.")
    folder = Path(arguments.output_dir)
    share, shares = arguments.share
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of accelerate launch and torchrun, also on a CPU
    worker, workers = share * processes + int(os.environ.get("RANK", 0)), shares * processes
    shards = Shards(folder, source.num_rows, arguments.shard_size)
    options = {
        "command": job.command,
        **job.options,
        "batch_size": arguments.batch_size,
        "shard_size": arguments.shard_size,
        "input": source.name,
        "input_sha256": source.fingerprint,
        "input_rows": source.num_rows,
        "versions": _compat.versions(),
    }
    _check_folder(folder, options)
    missing = [shard for shard in range(worker, len(shards), workers) if shards.find(shard) is None]
    if arguments.on_bad_row == "raise":
        for _ in sift(source.read([shards.span(shard) for shard in missing]), check=job.check):
            pass
    with hold(folder, f"-{worker}-of-{workers}"):
        if missing:
            options |= job.load()
            _check_folder(folder, options)
            with writing(folder):
                write_json(folder / OPTIONS, options)
            _write(arguments, source, job, shards, missing, options)
        return _finish(arguments, job, shards, again=not missing and worker == 0)


def _check_folder(folder: Path, options: Mapping[str, Any]) -> None:
    """Whether the folder is free, or holds a part of what would be written now."""
    if folder.is_dir():
        check_ours(folder)
        if any(folder.glob("data/train-*")):
            check_options(folder, options)


def _write(
    arguments: RunArguments,
    source: Source,
    job: Job,
    shards: Shards,
    missing: Sequence[int],
    options: Mapping[str, Any],
) -> None:
    """The shards that are missing, one after the other."""
    schema = job.schema()
    check = job.check if arguments.on_bad_row == "skip" else None  # else all rows have passed it
    spans = [shards.span(shard) for shard in missing]
    stream = source.read(spans)
    with _progress() as bars, _settled():
        bar = bars.add_task(job.command, total=sum(map(len, spans)))
        for shard, span in zip(missing, spans, strict=True):
            labelled = Labelled()
            found = itertools.islice(stream, len(span))
            rows = list(sift(found, check=check, on_bad_row=arguments.on_bad_row, bad=labelled.bad))
            bars.advance(bar, len(span) - len(rows))
            for start in range(0, len(rows), arguments.batch_size):
                batch = rows[start : start + arguments.batch_size]
                some = job.label(batch)
                if some.bad and arguments.on_bad_row == "raise":
                    raise InputError(f"{some.bad[0].where} {some.bad[0].reason}")
                labelled.add(some)
                bars.advance(bar, len(batch))
            shards.write(shard, labelled, schema, options)


@contextmanager
def _settled() -> Iterator[None]:
    """
    Spare the garbage collector what is there by now: models and libraries hold a million objects, and looking through
    them again and again took two fifths of the pipeline's time.
    """
    if gc.get_freeze_count():  # somebody else's doing
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _finish(arguments: RunArguments, job: Job, shards: Shards, *, again: bool) -> dict[str, Any] | None:
    """
    Say what is to be said of the whole, if it is whole: the first worker to see that does so, and a later run that
    finds nothing left to do (`again`).
    """
    folder = shards.folder
    with hold(folder, "-finish", wait=True):
        there = sum(shards.find(shard) is not None for shard in range(len(shards)))
        if there < len(shards):
            print(f"{there} of {len(shards)} shards are there. Whoever writes the last finishes the data set")
            return None
        options = json.loads((folder / OPTIONS).read_bytes())
        counts: Counts = {}
        listed: list[dict[str, Any]] = []
        number = 0
        for note in shards.notes(options):
            add_counts(counts, note["counts"])
            number += len(note["bad"])
            listed += note["bad"][: _LISTED - len(listed)]
        summary = job.summarise(counts) | {"bad_rows": {"count": number, "first": listed}}
        is_first = not (folder / SUMMARY).exists()
        with writing(folder):
            write_json(folder / SUMMARY, summary)
            write_card(folder, options, summary, about=job.about)
        if is_first or again:
            job.show(summary, folder)
            if arguments.push_to_hub:
                push(folder, arguments.push_to_hub)
        return summary


class _Rate(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f} rows/s")


def _progress() -> Progress:
    """Rows done, rows a second and time left, on the main process's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=os.environ.get("LOCAL_RANK", "0") != "0")
