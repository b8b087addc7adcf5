"""How sure a mean is, and whether two columns rise together. Pure."""

import random
import statistics
from collections.abc import Sequence

_RESAMPLES = 2000


def bootstrap(values: Sequence[float], groups: Sequence[object], *, seed: int = 0) -> list[float]:
    """
    A mean with its 95 % interval, by drawing whole groups anew (2,000 times, seeded).

    Args:
        values (`Sequence[float]`): What is averaged.
        groups (`Sequence`): To which group each belongs: values of one prompt are not independent.

    Returns:
        `list[float]`: mean, 2.5 % and 97.5 % quantile of the resampled means.
    """
    by_group: dict[object, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    sums = [(sum(one), len(one)) for one in by_group.values()]
    rng = random.Random(seed)
    means = []
    for _ in range(_RESAMPLES):
        again = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in again) / sum(count for _, count in again))
    means.sort()
    return [sum(values) / len(values), means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES)]]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two columns; `None` where one of them does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
