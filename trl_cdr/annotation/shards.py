"""Rows in shards: a Parquet file for every so many rows of the input, each of which says itself what it covers.

    data/train-000012.parquet       of the input's rows 12 * shard_size and following
        footer: {"rows": [6144, 6656], "options": hash of options.json, "counts": ..., "bad": [...]}

A shard takes its name when all of it is on the disk, so that the ones that are there are what is done, wherever a run
was killed. What is in it depends on its number alone, not on who wrote it, nor on how many did. Knows no model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError, InputError
from .reader import BadRow
from .score_folder import WITHOUT_EFFECT, write_whole, writing

_KEY = b"trl_cdr"
Counts = dict[str, dict[str, float]]
"""What was counted, by domain; sums, so that those of several shards can be added."""


@dataclass(frozen=True)
class Labelled:
    """
    What came of some rows of the input.

    Attributes:
        rows (`list[dict]`): Rows to be written.
        counts (`Counts`): What of them is counted.
        bad (`list[BadRow]`): Rows of the input that were left out.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)

    def add(self, other: "Labelled") -> None:
        """Put another's behind this one's."""
        self.rows.extend(other.rows)
        self.bad.extend(other.bad)
        add_counts(self.counts, other.counts)


def add_counts(total: Counts, more: Mapping[str, Mapping[str, float]]) -> None:
    """Add counts to others, in place."""
    for domain, counts in more.items():
        into = total.setdefault(domain, {})
        for name, value in counts.items():
            into[name] = into.get(name, 0) + value


@dataclass(frozen=True)
class Shards:
    """
    The shards of one run.

    Args:
        folder (`Path`): The run's output folder.
        num_rows (`int`): Rows of the input.
        size (`int`): Rows of the input that one shard is made of.
    """

    folder: Path
    num_rows: int
    size: int

    def __len__(self) -> int:
        return -(-self.num_rows // self.size)

    def span(self, shard: int) -> range:
        """The rows of the input that a shard is made of."""
        return range(shard * self.size, min((shard + 1) * self.size, self.num_rows))

    def path(self, shard: int, *, is_empty: bool = False) -> Path:
        """
        Where a shard lies. One without rows has another suffix: `load_dataset` can't read such a file (datasets 4 an
        empty file, datasets 5 an empty row group).
        """
        return self.folder / "data" / f"train-{shard:06d}.{'empty' if is_empty else 'parquet'}"

    def find(self, shard: int) -> Path | None:
        """A shard's file, if it is there."""
        places = (self.path(shard, is_empty=is_empty) for is_empty in (False, True))
        return next((path for path in places if path.is_file()), None)

    def write(self, shard: int, labelled: Labelled, schema: pa.Schema, options: Mapping[str, Any]) -> None:
        """
        Write a shard, or nothing.

        Args:
            shard (`int`): Which.
            labelled (`Labelled`): What came of its rows.
            schema (`pa.Schema`): Of what is written.
            options (`Mapping`): What they were made of and with.

        Raises:
            ConfigError: the disk is full, or can't be written.
            InputError: a value is not of the schema.
        """
        span = self.span(shard)
        note = {
            "rows": [span.start, span.stop],
            "options": digest(options),
            "counts": labelled.counts,
            "bad": [asdict(row) for row in labelled.bad],
        }
        try:
            table = pa.Table.from_pylist(labelled.rows, schema=schema.with_metadata({_KEY: json.dumps(note)}))
        except (pa.ArrowException, OverflowError) as error:  # whole numbers beyond 2^53 in a column with fractions
            raise InputError(
                f"rows {span.start} to {span.stop - 1} hold a value that the columns of all rows can't: {error}. Give "
                "each field one kind of value."
            ) from error
        path = self.path(shard, is_empty=not labelled.rows)
        with writing(self.folder):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, lambda file: pq.write_table(table, file))

    def notes(self, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """
        What each shard that is there says of itself, in order: `rows`, `counts` and `bad`.

        Args:
            options (`Mapping`): What all of them have to be made of and with.

        Raises:
            ConfigError: a shard can't be read, or is another run's.
        """
        wanted = digest(options)
        for shard in range(len(self)):
            path, span = self.find(shard), self.span(shard)
            if path is None:
                continue
            try:
                note = json.loads((pq.read_metadata(path).metadata or {})[_KEY])
                if (note["options"], note["rows"]) != (wanted, [span.start, span.stop]):
                    raise ValueError("it was made otherwise")
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(
                    f"{str(path)!r} is no shard of this run ({error}). Remove it, and the same command makes it anew."
                ) from error
            yield note


def digest(options: Mapping[str, Any]) -> str:
    """A hash of what rows are made of and with."""
    compared = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
