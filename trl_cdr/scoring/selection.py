"""A group's rewards -> its chosen and its rejected completion. Pure: knows no model, no trainer, and where rewards come
from does not matter.
"""

import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_LEAST_SPREAD = 1e-4  # as in TRL's GRPO: equal values stay equal

PairStrategy = Literal["best_worst", "best_random"]
Skipped = Literal["tie", "missing", "truncated", "min_margin"]


@dataclass(frozen=True)
class Pair:
    """
    Two completions of one group.

    Attributes:
        chosen, rejected (`int`): Indices into the group. They differ unless the group has a single completion.
        margin (`float`): Reward of the chosen minus reward of the rejected; NaN where either is missing.
        skipped (`Skipped` or `None`): Why nothing is to be learnt from the pair, or None.
    """

    chosen: int
    rejected: int
    margin: float
    skipped: Skipped | None

    @property
    def weight(self) -> float:
        """The pair's weight in a loss: 1, or 0 where it is skipped."""
        return 0.0 if self.skipped else 1.0


def combine_rewards(rewards: Tensor, weights: Tensor, *, num_generations: int, normalize: bool = False) -> Tensor:
    """
    Combine the values of several reward functions into one reward for each completion, comparable within its group.

    A function that says nothing about a whole group (a reward for mathematics, at a question of taste) is left out
    there. One that says nothing about some completions of a group makes these missing: a sum over the other functions
    could not be compared with its neighbours', and 0 in its place would often win against honest negative rewards.

    Args:
        rewards (`Tensor` of shape (B, F)): Value of each function; what is not finite is missing. A group's rows follow
            one another.
        weights (`Tensor` of shape (F,)): Weight of each function; with 0 it is not even looked at.
        num_generations (`int`): Completions of a group; a divisor of B.
        normalize (`bool`, *optional*, defaults to `False`): Scale each function's values within a group to mean 0 and
            standard deviation 1 before they are weighted (GDPO, arXiv 2601.05242), so that no function decides because
            of its unit. The reward's unit is then standard deviations.

    Returns:
        `Tensor` of shape (B,), float64: weighted sums, NaN if a reward is missing.
    """
    used = weights != 0
    grouped = rewards.double()[:, used].view(-1, num_generations, int(used.sum()))  # (B / G, G, F)
    missing = ~grouped.isfinite()
    silent = missing.all(dim=1, keepdim=True)  # (B / G, 1, F)
    if normalize:
        grouped = _normalized(grouped, missing)
    sums = (grouped.masked_fill(missing, 0.0) * weights.double()[used]).sum(dim=2)
    incomplete = (missing & ~silent).any(dim=2) | silent.all(dim=2)
    combined: Tensor = sums.masked_fill(incomplete, math.nan).flatten()
    return combined


def _normalized(grouped: Tensor, missing: Tensor) -> Tensor:
    """Values (N, G, F), of each function and group with mean 0 and standard deviation 1 over those not missing."""
    count = (~missing).sum(dim=1, keepdim=True)  # (N, 1, F)
    mean = grouped.masked_fill(missing, 0.0).sum(dim=1, keepdim=True) / count
    distance = grouped - mean
    variance = distance.masked_fill(missing, 0.0).square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return distance / (variance.sqrt() + _LEAST_SPREAD)


def select_pair(
    rewards: Sequence[float],
    *,
    strategy: PairStrategy,
    rng: random.Random,
    min_margin: float = 0.0,
    truncated: Collection[int] = (),
) -> Pair:
    """
    Choose the pair of a group.

    Args:
        rewards (`Sequence[float]`): One for each completion; what is not finite is missing.
        strategy (`PairStrategy`): `"best_worst"`: the lowest reward is rejected. `"best_random"`: one of the others,
            drawn evenly, as in the paper (arXiv 2411.02481). Of equal rewards the first counts as best and as worst.
        rng (`random.Random`): What `"best_random"` draws from: the caller's own, so that no global state moves.
        min_margin (`float`, *optional*, defaults to 0): Pairs of a smaller margin are skipped, in the reward's unit.
        truncated (`Collection[int]`, *optional*): Indices of completions that were cut off, and may be in no pair.

    Returns:
        `Pair`: its `skipped` is `"missing"` where fewer than two rewards are there, `"truncated"` where fewer than two
        of these belong to completions that were not cut off, `"tie"` where both are equal, `"min_margin"` where they
        are too close.
    """
    scored = [index for index, reward in enumerate(rewards) if math.isfinite(reward)]
    whole = [index for index in scored if index not in truncated]
    if len(whole) < 2:
        reason: Skipped = "missing" if len(scored) < 2 else "truncated"
        return Pair(chosen=0, rejected=min(1, len(rewards) - 1), margin=math.nan, skipped=reason)
    chosen = max(whole, key=rewards.__getitem__)
    others = [index for index in whole if index != chosen]
    rejected = min(others, key=rewards.__getitem__) if strategy == "best_worst" else rng.choice(others)
    return _compare(rewards, chosen, rejected, min_margin)


def select_all_pairs(
    rewards: Sequence[float], *, min_margin: float = 0.0, truncated: Collection[int] = ()
) -> list[Pair]:
    """
    Every pair of a group, the higher reward chosen; arguments as for `select_pair`.

    Returns:
        `list[Pair]`: the two of each of the completions that have a reward and were not cut off, in the group's order.
            Where there are fewer than two of them, the one pair that says why.
    """
    whole = [index for index, reward in enumerate(rewards) if math.isfinite(reward) and index not in truncated]
    if len(whole) < 2:
        return [select_pair(rewards, strategy="best_worst", rng=random.Random(), truncated=truncated)]
    ordered = (sorted(pair, key=lambda index: -rewards[index]) for pair in itertools.combinations(whole, 2))
    return [_compare(rewards, chosen, rejected, min_margin) for chosen, rejected in ordered]


def _compare(rewards: Sequence[float], chosen: int, rejected: int, min_margin: float) -> Pair:
    margin = rewards[chosen] - rewards[rejected]
    skipped: Skipped | None = None
    if margin == 0:
        skipped = "tie"
    elif margin < min_margin:
        skipped = "min_margin"
    return Pair(chosen=chosen, rejected=rejected, margin=margin, skipped=skipped)
