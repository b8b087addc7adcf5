"""Few labels, well spent: which pairs of completions a person should judge, and which candidate the judgements choose.

A candidate is a way to score: a pair of models, a reduction, criteria or none. Labels buy the choice among them and
train nothing. What a label can say of that choice is where candidates disagree: elsewhere all are right or all wrong.
Pure, but for reading a file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .accuracy import Values
from .bouts import request_key
from .intervals import bootstrap
from .preferences import Preference
from .reader import open_source, read_rows


def suggest(margins: Mapping[str, Values], preferences: Sequence[Preference], *, most: int) -> list[dict[str, Any]]:
    """
    The pairs whose label would say most about the choice between candidates, the best first.

    First come pairs over which candidates disagree, and of these what the policy itself wrote (`on_policy`); then the
    more evenly the candidates are split, the earlier; and of an even split, those with the smaller margins, each in
    units of its candidate's median. One pair a prompt. Pairs that nobody has judged are taken where there are any.

    Args:
        margins (`Mapping[str, NDArray]`): By candidate the value of the first completion less that of the second, for
            each of N pairs.
        preferences (`Sequence[Preference]`): The N, each with two completions.
        most (`int`): At most so many.

    Returns:
        `list[dict]`: `id`, `prompt`, `completions` (two, in an order that says nothing), `better` (None: to be filled
        in with 0 or 1), `on_policy`, `split` (share of candidates on the smaller side) and `prefer` (by candidate 0 or
        1, None for a tie).
    """
    table = np.stack(list(margins.values()))  # (C, N)
    first, second = (table > 0).sum(axis=0), (table < 0).sum(axis=0)
    split = np.minimum(first, second) / len(table)  # (N,)
    units = np.median(np.abs(table), axis=1, keepdims=True)
    narrow = (np.abs(table) / np.where(units > 0, units, 1.0)).mean(axis=0)
    is_open = any(not one.is_labelled for one in preferences)
    places = [place for place, one in enumerate(preferences) if not (is_open and one.is_labelled)]
    places.sort(key=lambda p: (split[p] == 0, not preferences[p].on_policy, -split[p], narrow[p]))
    by_prompt: dict[str, int] = {}
    for place in places:
        by_prompt.setdefault(request_key(preferences[place].prompt), place)
    return [
        _ask(preferences[place], float(split[place]), {name: float(column[place]) for name, column in margins.items()})
        for place in list(by_prompt.values())[:most]
    ]


def _ask(one: Preference, split: float, margins: Mapping[str, float]) -> dict[str, Any]:
    texts = sorted(one.completions, key=lambda text: hashlib.sha256(text.encode()).digest())
    sign = 1 if texts[0] == one.completions[0] else -1
    return {
        "id": one.id,
        "prompt": one.prompt,
        "completions": texts,
        "better": None,
        "on_policy": one.on_policy,
        "split": split,
        "prefer": {name: int(sign * margin < 0) if margin else None for name, margin in margins.items()},
    }


def read_labels(path: str) -> list[dict[str, Any]]:
    """
    Labels: the rows of `suggest`, with `better` filled in; rows in which it is not are passed over.

    Raises:
        InputError: the file can't be read, or a row is no such row.
    """

    def check(fields: Mapping[str, Any]) -> str | None:
        texts, better = fields.get("completions"), fields.get("better")
        if not {"id", "completions"} <= fields.keys() or not isinstance(texts, (list, tuple)) or len(texts) != 2:
            return "needs the fields id and completions (two). Take the rows of suggestions.jsonl."
        return None if better in (0, 1, None) else f"has better: {better!r}. Use 0, 1 or null."

    source = open_source(Path(path), split="train", subset=None)
    found = [row.fields for row in read_rows(source, check=check) if row.fields.get("better") is not None]
    if not found:
        raise InputError(
            f"labels is {path!r}, in which no row says which completion is better. Fill in better: 0 or 1."
        )
    return found


def choose(
    margins: Mapping[str, Values],
    preferences: Sequence[Preference],
    labels: Sequence[Mapping[str, Any]],
    *,
    seed: int,
) -> dict[str, Any]:
    """
    The candidate that agrees best with labels.

    Pairs that were suggested are those over which candidates disagree: the shares compare candidates, and say nothing
    of how good one is elsewhere.

    Args:
        margins, preferences: As for `suggest`.
        labels (`Sequence[Mapping]`): Rows of `read_labels`.
        seed (`int`): Of the intervals.

    Returns:
        `dict`: `labels` (that were used), `unknown` (that name no pair), `candidates` (by name `[share, low, high]`,
        see `bootstrap`, the best first), `best`, and `lead` of the best over the next one, `[mean, low, high]`.

    Raises:
        InputError: no label names a pair.
    """
    known = {(one.id, frozenset(one.completions)): place for place, one in enumerate(preferences)}
    places, signs = [], []
    for label in labels:
        texts = label["completions"]
        place = known.get((str(label["id"]), frozenset(texts)))
        if place is not None:
            places.append(place)
            signs.append(1 if texts[int(label["better"])] == preferences[place].completions[0] else -1)
    if not places:
        raise InputError("no label names a pair of the data: ids and completions have to be those that were suggested.")
    prompts = [request_key(preferences[place].prompt) for place in places]
    wins = {}
    for name, column in margins.items():
        agreed = column[places] * np.array(signs)
        wins[name] = ((agreed > 0) + (agreed == 0) / 2).tolist()
    best, *others = sorted(wins, key=lambda name: -sum(wins[name]))
    lead = None
    if others:
        ahead = [ours - theirs for ours, theirs in zip(wins[best], wins[others[0]], strict=True)]
        lead = bootstrap(ahead, prompts, seed=seed)
    return {
        "labels": len(places),
        "unknown": len(labels) - len(places),
        "candidates": {name: bootstrap(wins[name], prompts, seed=seed) for name in (best, *others)},
        "best": best,
        "lead": lead,
    }
