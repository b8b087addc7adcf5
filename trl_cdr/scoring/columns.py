"""What a call of the scorer brings, in columns with an entry for each row: checked, and those of several calls joined.

Knows no model; `scorer` reads what stands in them.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .types import Message, Prompt, shorten


@dataclass(frozen=True)
class Columns:
    """
    The rows of one call.

    Attributes:
        prompts, completions (`list`): See `DensityRatioScorer.score`, as the following.
        completion_ids (`list[list[int]]` or `None`): The policy's tokens.
        domains (`list[str | None]` or `None`): What is known of the domains.
    """

    prompts: list[Prompt]
    completions: list[str | Sequence[Message]]
    completion_ids: list[list[int]] | None = None
    domains: list[str | None] | None = None


def join_columns(parts: Sequence[Columns]) -> Columns:
    """
    The rows of several calls as those of one; a call without rows has no say in which columns there are.

    Args:
        parts (`Sequence[Columns]`): At least one.

    Raises:
        InputError: some calls have a column that others lack.
    """
    filled = [part for part in parts if part.prompts] or parts[:1]
    joined: dict[str, Any] = {}
    for name in ("prompts", "completions", "completion_ids", "domains"):
        columns = [getattr(part, name) for part in filled]
        lacking = [index for index, column in enumerate(columns) if column is None]
        if lacking and len(lacking) < len(columns):
            raise InputError(
                f"{name} is missing on some of the processes whose rows are scored together, and there on others. Pass "
                "it on all, or on none."
            )
        joined[name] = None if lacking else [entry for column in columns for entry in column]
    return Columns(**joined)


def check_columns(prompts: Any, completions: Any, **optional: Any) -> None:
    """
    Raises:
        InputError: something is no list, lengths differ, or `finished` has another value than True, False and None.
    """
    given = {name: values for name, values in optional.items() if values is not None}
    for name, values in {"prompts": prompts, "completions": completions, **given}.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(f"{name} is {shorten(values)}. Pass a list with one entry for each row.")
        if len(values) != len(prompts):
            raise InputError(
                f"{name} has {len(values)} rows and prompts has {len(prompts)}: the two are read side by side. "
                "Pass as many of one as of the other."
            )
    for index, said in enumerate(given.get("finished", ())):
        if not is_finished_or_not(said):
            raise InputError(f"finished[{index}] is {said!r}. Use True, False or None.")


def is_finished_or_not(value: Any) -> bool:
    """Whether a value says that a completion is finished, that it is not, or nothing; 0 equals False, and does not."""
    return value is None or isinstance(value, bool)


def check_ids(completion_ids: Sequence[Any]) -> list[list[int]]:
    """
    Plain integers, whatever kind of sequence a trainer hands over.

    Raises:
        InputError: there is anything else.
    """
    checked = []
    for index, row in enumerate(completion_ids):
        try:
            checked.append([operator.index(token) for token in row])
        except TypeError:
            raise InputError(
                f"completion_ids[{index}] is {shorten(row)}. Pass a list of token ids for each row, or none at all."
            ) from None
    return checked
