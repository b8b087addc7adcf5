"""What the reports of `evaluate` and `rank_pairs` share: tables of cells, intervals in words, what was left out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..scoring.string_prompts import describe_strings

_WIDTH = 110  # columns of what is no terminal


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """
    Print a table on stdout.

    Args:
        title (`str`): Above it.
        head (`Sequence[str]`), rows (`Sequence[Sequence[str]]`): Its cells.
        names (`int`, *optional*, defaults to 1): Columns that hold names; the others are numbers.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(title, style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name.replace("_", " "), justify="right" if place >= names else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def share(interval: Sequence[float]) -> str:
    """A share with its interval."""
    mean, low, high = interval
    return f"{mean:.3f} ({low:.2f}-{high:.2f})"


def difference(interval: Sequence[float]) -> str:
    """A difference of shares with its interval."""
    mean, low, high = interval
    return f"{mean:+.3f} ({low:+.2f} to {high:+.2f})"


def say_what_was_run(found: Mapping[str, Any]) -> Iterator[str]:
    """Of a summary how many passes it took, and what was left out, line by line."""
    passes = found["passes"]
    yield f"passes: {passes['run']} models run, {passes['found']} found in the cache"
    yield from describe_strings(found["string_prompts"])
    if found["truncated"]:
        yield f"prompts cut on the left: {found['truncated']}"
    for reason, count in (*found["unscorable"].items(), *found.get("bad_rows", {}).items()):
        yield f"left out ({count}): {reason}"
