"""Rows of a preference set -> prompts with better and worse completions, each of a subset and a domain. Runs no model.

A row holds `prompt`, `chosen` and `rejected` (strings or messages; whole conversations too, whose common start is the
prompt), maybe `subset`, `domain`, `id` and `on_policy`. `chosen` and `rejected` may be lists of strings: RewardBench 2
has one right and three wrong completions, or many of both. A pair that nobody has judged holds `completions`, two of
them. `rewardbench` knows the subsets of the published sets, `evaluate` counts.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..scoring.completions import read_completion
from ..scoring.encoding import Prompt, Unscorable, shorten
from .rewardbench import Benchmark


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

    @property
    def completions(self) -> tuple[str, ...]:
        """Those that are better first."""
        return self.chosen + self.rejected


def read_preferences(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    name: str,
    benchmark: Benchmark | None = None,
    column: str = "domain",
    skip: bool = False,
) -> tuple[list[Preference], Counter[str]]:
    """
    Read the rows of one set.

    Args:
        rows (`Iterable[tuple[str, Mapping]]`): Where each stands, for messages, and the row.
        name (`str`): The set's; the subset of rows that name none, and part of the ids of rows that have none.
        benchmark (`Benchmark`, *optional*): Whose set it is: its sections are the domains, and prompts that are strings
            are a user's turn.
        column (`str`, *optional*, defaults to `"domain"`): Which names the domain for the criteria.
        skip (`bool`, *optional*, defaults to `False`): Leave bad rows out, and count them.

    Returns:
        `tuple`: The preferences, and of bad rows how many there are for each reason.

    Raises:
        InputError: a row is bad; not with `skip`.
    """
    found: list[Preference] = []
    bad: Counter[str] = Counter()
    for number, (where, row) in enumerate(rows):
        try:
            found.append(_read(row, f"{name}:{number}", name=name, benchmark=benchmark, column=column))
        except (_Bad, Unscorable) as reason:
            if not skip:
                raise InputError(f"{where}: {reason}. Mend the row, or pass on_bad_row='skip'.") from None
            bad[str(reason)] += 1
    return found, bad


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
    if not isinstance(row, Mapping):
        raise _Bad(f"it is {shorten(row)}, and a row holds prompt, chosen and rejected")
    is_labelled = row.get("completions") is None or row.get("chosen") is not None
    if is_labelled:
        sides = [row.get(side) for side in ("chosen", "rejected")]
        if None in sides:
            raise _Bad(f"it has no {'chosen' if sides[0] is None else 'rejected'}")
    else:
        sides = list(row["completions"]) if isinstance(row["completions"], (list, tuple)) else []
        if len(sides) != 2:
            raise _Bad(f"it has {len(sides)} completions and no chosen: a pair has two")
    prompt, turns = _find_prompt(row.get("prompt"), sides)
    if benchmark is not None and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen, rejected = (_read_side(side) for side in turns)
    if set(chosen) & set(rejected):
        raise _Bad("one completion is both chosen and rejected" if is_labelled else "its completions are equal")
    subset = str(row.get("subset") or name)
    said = row.get(column)
    return Preference(
        id=str(row["id"]) if row.get("id") is not None else id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        subset=subset,
        domain=str(row.get("domain") or subset) if benchmark is None else benchmark.section_of(subset),
        criteria_domain=None if said is None else str(said),
        is_labelled=is_labelled,
        on_policy=bool(row.get("on_policy")),
    )


def _find_prompt(prompt: Any, sides: Sequence[Any]) -> tuple[Prompt, list[Any]]:
    """The prompt, and what the two sides add to it: whole conversations hold it, and it may stand in the row, too."""
    if all(_is_conversation(side) and len(side) > 1 for side in sides):
        starts, ends = [list(side[:-1]) for side in sides], [list(side[-1:]) for side in sides]
        if starts[0] != starts[1]:
            raise _Bad("chosen and rejected are conversations that differ before their last message")
        if prompt is not None and prompt != starts[0] and prompt != starts[0][-1].get("content"):
            raise _Bad("its prompt is not what chosen and rejected start with")
        return starts[0], ends
    if prompt is None:
        raise _Bad("it has no prompt")
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise _Bad(f"its prompt is {shorten(prompt)}: a prompt is a string or a list of messages")
    if not prompt:
        raise _Bad("its prompt is empty")
    return prompt, list(sides)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _read_side(side: Any) -> tuple[str, ...]:
    """Completions: one, as a string or a message, or a list of strings."""
    if isinstance(side, (list, tuple)) and all(isinstance(text, str) for text in side):
        if not side:
            raise _Bad("it has no completion on one side")
        return tuple(read_completion(text) for text in side)
    return (read_completion(side),)
