"""Values of completions -> how often the better one is preferred, by subset, by domain, and the mean of domains. Pure.

A domain is the mean of its subsets and the whole the mean of its domains, as RewardBench has it: pooled, the largest
subset would speak for all. Intervals come from drawing the prompts of each subset anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scoring.types import Prompt
from .bouts import request_key
from .preferences import Preference

Values = NDArray[np.float64]

_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Choices:
    """
    Which completions belong to which preference.

    Attributes:
        index (`NDArray` of shape (N, K), int): Of N preferences the places of their completions among all of them, the
            chosen ones first; -1 where one has fewer than K.
        is_chosen (`NDArray` of shape (N, K), bool): Which are the better ones.
    """

    index: NDArray[np.int64]
    is_chosen: NDArray[np.bool_]

    @classmethod
    def of(cls, preferences: Sequence[Preference]) -> "Choices":
        """Of preferences whose completions stand one after the other."""
        widest = max(len(one.completions) for one in preferences)
        index = np.full((len(preferences), widest), -1, dtype=np.int64)
        is_chosen = np.zeros(index.shape, dtype=np.bool_)
        start = 0
        for place, one in enumerate(preferences):
            count = len(one.completions)
            index[place, :count] = range(start, start + count)
            is_chosen[place, : len(one.chosen)] = True
            start += count
        return cls(index, is_chosen)


def credits(values: Values, choices: Choices) -> Values:
    """
    What each preference earns by the rule of `rewardbench.credit`: 1 where the chosen completion's value is the
    highest, 1 / k where it is one of k that are, so that a tie of two counts half; with several chosen ones 1 where all
    of them are above all others.

    Args:
        values (`NDArray` of shape (T,)): Of the completions.
        choices (`Choices`): Of N preferences.

    Returns:
        `NDArray` of shape (N,).
    """
    each = np.where(choices.index >= 0, values[choices.index], -np.inf)  # (N, K)
    highest = each.max(axis=1)
    first = np.where(each[:, 0] == highest, 1 / (each == highest[:, None]).sum(axis=1), 0.0)
    least = np.where(choices.is_chosen, each, np.inf).min(axis=1)
    others = np.where(choices.is_chosen, -np.inf, each).max(axis=1)
    return np.where(choices.is_chosen.sum(axis=1) > 1, (least > others).astype(float), first)


def average(columns: Values, preferences: Sequence[Preference], *, seed: int) -> list[dict[str, Any]]:
    """
    Means with their 95 % intervals. Prompts are drawn anew within each subset (2,000 times, the same draws for all
    columns, so that the mean of a difference of columns has the interval of the difference).

    Args:
        columns (`NDArray` of shape (J, N)): Of J judges what each of N preferences earned.
        preferences (`Sequence[Preference]`): The N.
        seed (`int`): Of the draws.

    Returns:
        `list[dict]`: for each column `mean` (of the domains), `domains` and `subsets` (by name), each `[mean, low,
        high]`. A subset's name has its domain before it where two domains have a subset of that name.
    """
    rng = np.random.default_rng(seed)
    subsets: dict[str, Values] = {}  # (J, 1 + R) each: the mean, and those of the draws
    by_domain: dict[str, list[Values]] = {}
    for stratum in strata(preferences):
        drawn = _resample(columns[:, stratum.places], [preferences[place].prompt for place in stratum.places], rng)
        subsets[stratum.name] = drawn
        by_domain.setdefault(stratum.domain, []).append(drawn)
    domains = {domain: np.mean(each, axis=0) for domain, each in by_domain.items()}
    whole = np.mean(list(domains.values()), axis=0)
    return [
        {
            "mean": _interval(whole[place]),
            "domains": {name: _interval(drawn[place]) for name, drawn in domains.items()},
            "subsets": {name: _interval(drawn[place]) for name, drawn in subsets.items()},
        }
        for place in range(len(columns))
    ]


@dataclass(frozen=True)
class Stratum:
    """A subset, its domain, and the places of its preferences. Where two domains have one, the name says which."""

    name: str
    domain: str
    places: list[int]


def strata(preferences: Sequence[Preference]) -> list[Stratum]:
    """The subsets of preferences, in the alphabetical order of their domains and names."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(preferences):
        found.setdefault((one.domain, one.subset), []).append(place)
    names = [subset for _, subset in found]
    return [
        Stratum(subset if names.count(subset) == 1 else f"{domain}/{subset}", domain, places)
        for (domain, subset), places in sorted(found.items())
    ]


def without_length(values: Values, lengths: Values, *, share: float = 0.9, rounds: int = 3) -> Values:
    """
    Values less what is to be expected of a completion of that length: a regression of value on length, weighted by
    nearness (LOWESS, as in arXiv 2409.17407). No label is used.

    At a length x, a line is fitted to the values of the nearest nine tenths of the completions, each weighted by
    (1 - d^3)^3 with d its distance from x as a share of the farthest one's; then, three times over, those that are far
    from the curve are given less weight: (1 - u^2)^2 with u the residual over six times the median one. The curve is
    computed at 100 quantiles of the lengths, and straight between these.

    Args:
        values (`NDArray` of shape (T,)): Of completions.
        lengths (`NDArray` of shape (T,)): Of the same, in characters.
        share (`float`, *optional*, defaults to 0.9): Of the completions, for each line.
        rounds (`int`, *optional*, defaults to 3): Of weighting down.

    Returns:
        `NDArray` of shape (T,).
    """
    lengths = lengths - lengths.mean()  # so that their squares lose no digits
    knots = np.unique(np.quantile(lengths, np.linspace(0, 1, 100)))  # (Q,)
    distances = np.abs(knots[:, None] - lengths[None, :])  # (Q, T)
    count = max(2, int(share * len(values)))
    widths = np.partition(distances, count - 1, axis=1)[:, count - 1 : count]  # (Q, 1)
    near = (1 - np.clip(distances / np.where(widths > 0, widths, 1.0), 0, 1) ** 3) ** 3  # (Q, T)
    trust = np.ones(len(values))
    for _ in range(rounds + 1):
        curve = _fit_lines(near * trust, lengths, values, at=knots)
        residuals = values - np.interp(lengths, knots, curve)
        scale = 6 * float(np.median(np.abs(residuals)))
        if not scale:
            break
        trust = (1 - np.clip(residuals / scale, -1, 1) ** 2) ** 2
    return np.asarray(residuals)


def _fit_lines(weights: Values, x: Values, y: Values, *, at: Values) -> Values:
    """The height at each of Q places of the line that fits T points best under its own weights (Q, T)."""
    total = weights.sum(axis=1)
    total = np.where(total > 0, total, 1.0)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    spread = weights @ x**2 / total - mean_x**2
    slope = (weights @ (x * y) / total - mean_x * mean_y) / np.where(spread > 1e-9, spread, np.inf)
    return np.asarray(mean_y + slope * (at - mean_x))


def _resample(columns: Values, prompts: Sequence[Prompt], rng: np.random.Generator) -> Values:
    """Of J columns over the preferences of one subset the mean, and the means of draws of its prompts: (J, 1 + R)."""
    keys = {key: place for place, key in enumerate(dict.fromkeys(map(request_key, prompts)))}
    owner = np.array([keys[request_key(prompt)] for prompt in prompts])
    counts = np.bincount(owner).astype(float)  # (P,)
    sums = np.stack([np.bincount(owner, weights=column) for column in columns])  # (J, P)
    drawn = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=_RESAMPLES)  # (R, P)
    draws = np.concatenate([np.ones((1, len(keys))), drawn])
    return np.asarray((sums @ draws.T) / (draws @ counts))


def _interval(means: Values) -> list[float]:
    return [float(means[0]), *(float(quantile) for quantile in np.quantile(means[1:], _QUANTILES))]
