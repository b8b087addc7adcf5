"""A JSONL or Parquet file, a folder of them, a data set by name or in memory -> a stream of rows, each with its place.

A source is opened once, which counts and hashes its rows, and read as often as one likes, whole or in parts; at no time
is more of it in memory than a batch. What a row has to hold is the caller's to say (`check`). Runs no model.
"""

import glob
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..errors import ConfigError, InputError
from ..scoring.columns import is_finished_or_not

OnBadRow = Literal["raise", "skip"]
Check = Callable[[Mapping[str, Any]], str | None]
"""The fields of a row -> what is wrong with them, such as "needs the field prompt. Add it.", or None."""

_BATCH = 1000  # rows
_BUILDERS = {".json": "json", ".csv": "csv"}
_DATA = (".jsonl", ".jsonl.gz", ".parquet")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
FORMATS = (*_DATA, *_BUILDERS)
"""Endings of the files that can be read."""
_FORMS = f"a {', '.join(FORMATS)} file, a folder or a name on the Hub"


@dataclass(frozen=True, slots=True)
class Row:
    """
    A row that could be read.

    Attributes:
        index (`int`): Its place among all rows of the source, from 0.
        where (`str`): The same for people: file and line, or file and row.
        fields (`dict`): What it holds.
    """

    index: int
    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be read or used, and why. `index` and `where` as in `Row`."""

    index: int
    where: str
    reason: str


class _Part(Protocol):
    """One file, or one table. `first` is the index of its first row among those of the whole source."""

    first: int
    num_rows: int
    digest: str

    def read(self, spans: Sequence[range]) -> Iterator[Row | BadRow]:
        """The rows whose indices are in one of the spans, which ascend."""


@dataclass(frozen=True)
class Source:
    """
    Where rows come from, opened: what `open_source` returns.

    Attributes:
        name (`str`): What errors call it.
        parts (`tuple`): Its files or tables, in order.
    """

    name: str
    parts: tuple[_Part, ...]

    @property
    def num_rows(self) -> int:
        """How many rows it has, bad ones too."""
        return sum(part.num_rows for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """A hash of its content, wherever that lies and whatever it is called."""
        return hashlib.sha256(" ".join(part.digest for part in self.parts).encode()).hexdigest()

    def read(self, spans: Sequence[range] | None = None) -> Iterator[Row | BadRow]:
        """
        Its rows in order.

        Args:
            spans (`Sequence[range]`, *optional*): Indices of the rows that are wanted, ascending; the others are passed
                over cheaply. Default: all.

        Raises:
            InputError: a file can't be read to its end.
        """
        for part in self.parts:
            stop = part.first + part.num_rows
            wanted = [range(part.first, stop)] if spans is None else _clip(spans, part.first, stop)
            if wanted:
                yield from part.read(wanted)


def every(source: Source, step: int, *, start: int) -> Source:
    """
    A share of a source's rows: each `step`-th, from the row `start` on. They are counted anew, and keep their place.

    Args:
        source (`Source`): The whole.
        step, start (`int`): Rows.
    """
    return Source(source.name, (_Every(source, step, start),))


def open_source(
    source: str | Path | Dataset | Mapping[str, Dataset], *, split: str = "train", subset: str | None = None
) -> Source:
    """
    Find, count and hash the rows of a source.

    Args:
        source (`str`, `Path` or `Dataset`): A `.jsonl` (also `.jsonl.gz`), `.parquet`, `.json` or `.csv` file; a folder
            of such files, or one that `save_to_disk` wrote; a name on the Hub; or a data set.
        split (`str`, *optional*, defaults to `"train"`): Which split, where there are several. In a folder it is the
            files with this word in their path.
        subset (`str`, *optional*): Which subset (configuration) of a data set on the Hub.

    Raises:
        InputError: it can't be found or read, its name is empty, or it is a folder with files of several formats.
        ConfigError: there is no such split.
    """
    if isinstance(source, (Dataset, Mapping)):
        return Source("the data set", (_Table(_pick(source, split, "the data set"), "the data set", 0),))
    name, path = str(source), Path(source).expanduser()
    if not name.strip():  # an unset variable: it would be the current folder
        raise InputError(f"input is {name!r}, an empty name. Give {_FORMS}.")
    found: list[Path] = []
    if path.is_dir() and not _is_saved(path):
        _check_formats(path)
        found = _find_files(path, split)
    if found:
        return _open_files(name, found)
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.name.endswith(FORMATS)
    if is_path and not path.exists():
        raise InputError(f"input is {name!r}, which can't be read: no such file exists. Give {_FORMS}.")
    if path.is_file() and path.suffix not in _BUILDERS:
        return _open_files(name, [path])
    return Source(name, (_Table(_pick(_load(name, path, split, subset), split, name), name, 0),))


def read_rows(
    source: Source, *, check: Check | None = None, on_bad_row: OnBadRow = "raise", bad: list[BadRow] | None = None
) -> Iterator[Row]:
    """
    All rows of a source that can be used, one by one. Arguments and errors as for `sift`.

    Raises:
        InputError: also where a file can't be read to its end.
    """
    return sift(source.read(), check=check, on_bad_row=on_bad_row, bad=bad)


def sift(
    found: Iterable[Row | BadRow],
    *,
    check: Check | None = None,
    on_bad_row: OnBadRow = "raise",
    bad: list[BadRow] | None = None,
) -> Iterator[Row]:
    """
    The rows that can be used.

    Args:
        found (`Iterable`): What `Source.read` yields.
        check (`Check`, *optional*): What a row has to hold, such as `needs("prompt")`.
        on_bad_row (`str`, *optional*, defaults to `"raise"`): What becomes of a row that can't be read, or that `check`
            objects to: `"raise"`, or `"skip"`.
        bad (`list`, *optional*): Gets those that were skipped.

    Raises:
        InputError: a row is bad and `on_bad_row="raise"`; the message names file and row.
    """
    for row in found:
        reason = row.reason if isinstance(row, BadRow) else check and check(row.fields)
        if isinstance(row, Row) and not reason:
            yield row
        elif on_bad_row == "raise":
            raise InputError(f"{row.where} {reason}")
        elif bad is not None:
            bad.append(BadRow(row.index, row.where, str(reason)))


def check_on_bad_row(value: str) -> None:
    """
    Raises:
        ConfigError: it is none of `OnBadRow`; YAML and Python say what they like.
    """
    if value not in get_args(OnBadRow):
        raise ConfigError(f"on_bad_row is {value!r}. Use raise or skip.")


def needs(*names: str) -> Check:
    """The check for rows that hold these fields, and a truth value where they say `finished`."""
    wanted = {*names}
    listed = f"field{'s' * (len(names) > 1)} {' and '.join(names)}"

    def check(fields: Mapping[str, Any]) -> str | None:
        if not wanted <= fields.keys():
            return f"needs the {listed}. Add {'them' if len(names) > 1 else 'it'}."
        if not is_finished_or_not(fields.get("finished")):
            return f"has finished: {fields['finished']!r}. Use true or false, or leave it out."
        return None

    return check


class _Lines:
    """A JSONL file, plain or compressed. Empty lines are no rows."""

    def __init__(self, path: Path, name: str, first: int) -> None:
        self.path, self.name, self.first = path, name, first
        digest = hashlib.sha256()
        self.num_rows = 0
        for _, line in self._lines():
            digest.update(line)
            self.num_rows += 1
        self.digest = digest.hexdigest()

    def read(self, spans: Sequence[range]) -> Iterator[Row | BadRow]:
        waiting = iter(spans)
        span = next(waiting)
        for index, (number, line) in enumerate(self._lines(), start=self.first):
            if index < span.start:
                continue
            where = f"{self.name}:{number}"
            try:
                yield Row(index, where, _parse(line))
            except ValueError as error:
                yield BadRow(index, where, str(error))
            if index + 1 == span.stop:
                following = next(waiting, None)
                if following is None:
                    return
                span = following

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line that holds anything, with its number."""
        number = 0
        try:
            with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{self.name} can't be read beyond line {number}: {error}. Write or download it anew."
            ) from error


class _Parquet:
    """A Parquet file."""

    def __init__(self, path: Path, name: str, first: int) -> None:
        self.path, self.name, self.first = path, name, first
        try:
            with path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
            with pq.ParquetFile(path) as table:
                self.num_rows = int(table.metadata.num_rows)
        except (OSError, pa.ArrowException) as error:
            raise self._broken("", error) from error

    def read(self, spans: Sequence[range]) -> Iterator[Row | BadRow]:
        with pq.ParquetFile(self.path) as table:
            start = self.first
            for group in range(table.num_row_groups):
                stop = start + table.metadata.row_group(group).num_rows
                if _clip(spans, start, stop):
                    yield from self._read_group(table, group, range(start, stop), spans)
                start = stop

    def _read_group(
        self, table: pq.ParquetFile, group: int, rows: range, spans: Sequence[range]
    ) -> Iterator[Row | BadRow]:
        start = rows.start
        try:
            for batch in table.iter_batches(_BATCH, row_groups=[group]):
                for span in _clip(spans, start, start + batch.num_rows):
                    wanted = batch.slice(span.start - start, len(span)).to_pylist()
                    for index, fields in zip(span, wanted, strict=True):
                        yield Row(index, f"{self.name}, row {index - self.first}", fields)
                start += batch.num_rows
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise self._broken(f" beyond row {start - self.first}", error) from error

    def _broken(self, where: str, error: Exception) -> InputError:
        return InputError(f"{self.name} can't be read{where}: {_first_line(error)}. Write or download it anew.")


class _Table:
    """A data set that `datasets` holds, mapped into memory or in it."""

    def __init__(self, table: Dataset, name: str, first: int) -> None:
        self.table, self.name, self.first = table, name, first
        self.num_rows = len(table)
        digest = hashlib.sha256(" ".join(table.column_names).encode())
        for some in table.with_format("arrow").iter(_BATCH):
            for batch in some.combine_chunks().to_batches():
                digest.update(batch.serialize())
        self.digest = digest.hexdigest()

    def read(self, spans: Sequence[range]) -> Iterator[Row | BadRow]:
        for span in spans:
            for start in range(span.start, span.stop, _BATCH):
                places = range(start, min(start + _BATCH, span.stop))
                batch = self.table.with_format(None)[start - self.first : places.stop - self.first]
                for place, index in enumerate(places):
                    fields = {column: values[place] for column, values in batch.items()}
                    yield Row(index, f"{self.name}, row {index - self.first}", fields)


class _Every:
    """Each so-many-th row of a source."""

    first = 0

    def __init__(self, source: Source, step: int, start: int) -> None:
        self.source, self.step, self.start = source, step, start
        self.num_rows = len(range(start, source.num_rows, step))
        self.digest = hashlib.sha256(f"{source.fingerprint} {step} {start}".encode()).hexdigest()

    def read(self, spans: Sequence[range]) -> Iterator[Row | BadRow]:
        for span in spans:
            wanted = range(self.start + span.start * self.step, self.start + (span.stop - 1) * self.step + 1)
            found = itertools.islice(self.source.read([wanted]), 0, None, self.step)
            for index, row in zip(span, found, strict=True):
                yield replace(row, index=index)


def _open_files(name: str, paths: Sequence[Path]) -> Source:
    parts: list[_Part] = []
    for path in paths:
        kind = _Parquet if path.suffix == ".parquet" else _Lines
        parts.append(kind(path, str(path), sum(part.num_rows for part in parts)))
    return Source(name, tuple(parts))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, but none that is hidden, or in a hidden folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _check_formats(folder: Path) -> None:
    """
    Raises:
        InputError: a folder has CSV or JSON files beside files of another format: some of them would not be read.
    """
    by_format: dict[str, str] = {}
    for path in _visible_files(folder):
        if path.name.endswith(_DATA):
            by_format.setdefault("JSONL or Parquet", path.name)
        elif path.suffix == ".csv" or (path.suffix == ".json" and _holds_rows(path)):
            by_format.setdefault(path.suffix, path.name)
    if len(by_format) > 1:
        examples = ", ".join(f"{name} ({kind})" for kind, name in by_format.items())
        raise InputError(
            f"{str(folder)!r} has files of several formats: {examples}. A folder is read as one format, and the other "
            "files would be lost. Pass one file, or a folder for each format."
        )


def _holds_rows(path: Path) -> bool:
    """Whether a `.json` file has rows: a list, or an object on each line. One object alone is metadata."""
    with path.open("rb") as file:
        first = next((line for line in file if not line.isspace()), b"").lstrip(b"\xef\xbb\xbf \t")
        has_more = any(not line.isspace() for line in file)
    return first.startswith(b"[") or (has_more and first.rstrip().endswith(b"}"))


def _find_files(folder: Path, split: str) -> list[Path]:
    """A folder's files of one split that we read ourselves; all of them where no name says which split it is."""
    names = {
        path: {*re.split("[^a-z]+", str(path.relative_to(folder)).lower())}
        for path in _visible_files(folder)
        if path.name.endswith(_DATA)
    }
    found = [path for path, words in names.items() if split.lower() in words]
    if found:
        return found
    others = sorted(_SPLITS.intersection(itertools.chain(*names.values())))
    if others:
        raise ConfigError(
            f"{str(folder)!r} has no files of the split {split!r}, but of {', '.join(others)}. Pass split."
        )
    return list(names)


def _load(name: str, path: Path, split: str, subset: str | None) -> Any:
    """What `datasets` makes of a name."""
    try:
        if path.suffix in _BUILDERS:
            return load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train")
        if path.is_dir() and _is_saved(path):
            return load_from_disk(str(path))
        return load_dataset(str(path) if path.is_dir() else name, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"input is {name!r}, which can't be read: {_first_line(error)}. Give {_FORMS}.") from error


def _pick(found: Dataset | Mapping[str, Dataset], split: str, name: str) -> Dataset:
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ConfigError(f"{name} has no split {split!r}, but {', '.join(found)}. Pass split.")
    return found[split]


def _parse(line: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: why it is no row.
    """
    try:
        row = json.loads(line.decode())
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is no UTF-8 ({error}). Convert it.") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which no UTF-8 can hold. Mend its encoding.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error}). Write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object. Write one JSON object a line.")
    return row


def _clip(spans: Sequence[range], start: int, stop: int) -> list[range]:
    """What of the spans lies between two indices."""
    clipped = (range(max(span.start, start), min(span.stop, stop)) for span in spans)
    return [span for span in clipped if span]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
