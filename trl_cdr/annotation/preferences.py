"""Rows of a preference set -> prompts with better and worse completions, each of a subset and a domain. Runs no model.

A row holds `prompt`, `chosen` and `rejected` (strings or messages; whole conversations too, whose common start is the
prompt), maybe `subset`, `domain`, `id` and `on_policy`. `chosen` and `rejected` may be lists of strings: RewardBench 2
has one right and three wrong completions, or many of both. A pair that nobody has judged holds `completions`, two of
them. `rewardbench` knows the subsets of the published sets, `evaluate` counts.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..scoring.completions import read_completion
from ..scoring.string_prompts import as_turn
from ..scoring.types import Prompt, Unscorable, shorten
from .reader import FORMATS, BadRow, OnBadRow, Row, Source, read_rows
from .rewardbench import Benchmark, find_benchmark, looks_like

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preference:
    """
    Completions to one prompt, of which some are known to be better than the others.

    Attributes:
        id (`str`): What labels and published scores name it by.
        prompt (`Prompt`): A string or messages.
        chosen, rejected (`tuple[str, ...]`): At least one of each; every chosen one is better than every rejected one.
        subset, domain (`str`): Accuracies are averaged by subset, then by domain.
        criteria_domain (`str` or `None`): The domain that the row names for the criteria.
        is_labelled (`bool`): Whether it is known which is better. If not, `chosen` is the first of two.
        on_policy (`bool`): The policy that is to be trained wrote the completions.
        benchmark (`str` or `None`): The published set that it is of.
    """

    id: str
    prompt: Prompt
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    domain: str
    criteria_domain: str | None = None
    is_labelled: bool = True
    on_policy: bool = False
    benchmark: str | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        """Those that are better first."""
        return self.chosen + self.rejected


def read_preferences(
    source: Source,
    *,
    on_bad_row: OnBadRow = "raise",
    column: str | None = None,
    benchmark: str | None = None,
    name: str | None = None,
) -> tuple[list[Preference], list[BadRow]]:
    """
    Read a preference set.

    Args:
        source (`Source`): See `open_source`.
        on_bad_row (`str`, *optional*, defaults to `"raise"`): Or `"skip"`.
        column (`str`, *optional*, defaults to `"domain"`): Which names the domain for the criteria.
        benchmark (`str`, *optional*): Name of the published set (`rewardbench`) that the source is. Default: known by
            the source's name on the Hub. Rows without a domain get the set's section, and prompts that are strings are
            a user's turn.
        name (`str`, *optional*): Subset of rows without one. Default: see `name_sets`.

    Returns:
        `tuple`: The preferences, and the bad rows.

    Raises:
        InputError: a row is bad; not with `"skip"`.
    """
    known = find_benchmark(source.name) or find_benchmark(benchmark or "")
    if known is None:
        subsets = {str(row.fields.get("subset")) for row in source.read() if isinstance(row, Row)}
        if (alike := looks_like(subsets)) is not None:
            logger.warning(
                "%s has subsets of %s, and is counted as any other set. If it is that benchmark, pass benchmark=%s.",
                source.name,
                alike.name,
                alike.name,
            )
    read = partial(_read, name=name or name_sets([source.name])[0], benchmark=known, column=column or "domain")

    def check(fields: Mapping[str, Any]) -> str | None:
        try:
            read(fields, "")
        except _Bad as reason:
            return str(reason)
        except Unscorable as reason:
            return f"can't be scored: {reason}. Mend it."
        return None

    bad: list[BadRow] = []
    rows = read_rows(source, check=check, on_bad_row=on_bad_row, bad=bad)
    return [read(row.fields, f"{source.name}:{row.index}") for row in rows], bad


def name_sets(names: Sequence[str]) -> list[str]:
    """
    Return short names that tell sets apart: the name of the file or folder, without its format. If several have the
    same name, their folders are added (`helpful/test`, `harmless/test`), or at last the format.

    Args:
        names (`Sequence[str]`): Paths, or names on the Hub. Equal names stay equal.
    """
    parts = [(*Path(name).parts[:-1], _without_format(Path(name).name)) for name in names]
    depths = [1] * len(names)
    while True:
        short = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        counts = Counter(short)
        clashing = [index for index, name in enumerate(short) if counts[name] > 1]
        longer = [index for index in clashing if depths[index] < len(parts[index])]
        if not longer:
            break
        for index in longer:
            depths[index] += 1
    for index in clashing:
        short[index] = names[index]
    return short


def _without_format(name: str) -> str:
    ending = next((ending for ending in FORMATS if name.endswith(ending)), "")
    return name.removesuffix(ending) or name


def draw(preferences: Sequence[Preference], most: int, *, seed: int) -> list[Preference]:
    """
    Some of them, as evenly over the subsets as these allow; in their order.

    Args:
        preferences (`Sequence[Preference]`): To draw from.
        most (`int`): So many, or all.
        seed (`int`): Together with its id it says when a preference's turn is: more of them hold the fewer.
    """
    queues: dict[tuple[str, str], list[int]] = {}
    order = [hashlib.sha256(f"{seed} {one.id}".encode()).digest() for one in preferences]
    for place in sorted(range(len(preferences)), key=order.__getitem__):
        queues.setdefault((preferences[place].domain, preferences[place].subset), []).append(place)
    turns = sorted((turn, order[place], place) for queue in queues.values() for turn, place in enumerate(queue))
    return [preferences[place] for place in sorted(place for _, _, place in turns[:most])]


class _Bad(Exception):
    """What is wrong with a row."""


def _read(row: Mapping[str, Any], id: str, *, name: str, benchmark: Benchmark | None, column: str) -> Preference:
    is_labelled = row.get("completions") is None or row.get("chosen") is not None
    sides = [row.get("chosen"), row.get("rejected")] if is_labelled else row["completions"]
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or None in sides:
        held = sum(side is not None for side in sides) if isinstance(sides, (list, tuple)) else 0
        raise _Bad(
            f"has {held or 'no'} completion{'s' * (held != 1)}. Give it chosen and rejected, or completions: two."
        )
    prompt, turns = _find_prompt(row.get("prompt"), sides)
    if isinstance(prompt, str) and (benchmark is not None or all(_is_conversation(side) for side in turns)):
        prompt = as_turn(prompt)
    chosen, rejected = (_read_side(side) for side in turns)
    if set(chosen) & set(rejected):
        raise _Bad("has equal completions, of which neither is better. Drop the row.")
    subset = str(row.get("subset") or name)
    said = row.get(column)
    return Preference(
        id=str(row["id"]) if row.get("id") is not None else id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        subset=subset,
        domain=str(row.get("domain") or (subset if benchmark is None else benchmark.section_of(subset))),
        criteria_domain=None if said is None else str(said),
        is_labelled=is_labelled,
        on_policy=bool(row.get("on_policy")),
        benchmark=None if benchmark is None else benchmark.name,
    )


def _find_prompt(prompt: Any, sides: Sequence[Any]) -> tuple[Prompt, list[Any]]:
    """The prompt, and what the two sides add to it: whole conversations hold it, and it may stand in the row, too."""
    if all(_is_conversation(side) and len(side) > 1 for side in sides):
        starts, ends = [list(side[:-1]) for side in sides], [list(side[-1:]) for side in sides]
        if starts[0] != starts[1]:
            raise _Bad("has conversations that differ before their last message. Give it a prompt, and answers alone.")
        if prompt is not None and prompt != starts[0] and prompt != starts[0][-1].get("content"):
            raise _Bad("has a prompt that is not what its conversations start with. Leave one of them out.")
        return starts[0], ends
    if not prompt:
        raise _Bad("has no prompt. Add it.")
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise _Bad(f"has the prompt {shorten(prompt)}. Give it a string or a list of messages.")
    return prompt, list(sides)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _read_side(side: Any) -> tuple[str, ...]:
    """Completions: one, as a string or a message, or a list of strings."""
    if isinstance(side, (list, tuple)) and side and all(isinstance(text, str) for text in side):
        return tuple(read_completion(text) for text in side)
    return (read_completion(side),)
