"""Score -> reward: the log-ratio behind the gate that the score was made with. Pure; runs no model.

`ratio` and `surprise` have the formulas; `training.reward` hands the rewards to TRL, `annotation.probe` attacks them.
"""

import math
from collections.abc import Callable, Hashable, Sequence

from ..errors import UnscorableError
from .ratio import gate
from .score import Score
from .surprise import surprise_reward

_CALL = "the call"  # the name of all rows together


def rewards_from_scores(
    scores: Sequence[Score],
    *,
    on_unscorable: str,
    reduction: str = "sum",
    groups: Sequence[Hashable] | None = None,
    lowest: Callable[[dict[Hashable, float]], dict[Hashable, float]] = dict,
) -> list[float | None]:
    """
    Turn scores into rewards: the log-ratio behind the gate that they were made with, see `ratio.gate` and
    `surprise.surprise_reward`.

    Args:
        scores (`Sequence[Score]`): One call's.
        on_unscorable (`str`): For a row without a value. `"floor"`: the worst finite reward of its group minus 1 nat,
            for trainers that read a missing reward as 0, which would win against negative log-ratios. The row is then
            rejected. If the group has no reward, the worst reward of the call counts, and -1 if there is none.
            `"none"`: `None`. `"raise"`: stop.
        reduction (`str`, *optional*, defaults to `"sum"`): Of the scores.
        groups (`Sequence`, *optional*): For each row the name of its group: the completions that it competes with.
            Default: all rows are one group.
        lowest (`Callable`, *optional*): Takes the worst reward of each group and of the call, and returns the worst of
            all processes, if groups span processes. Default: those of this call.

    Raises:
        UnscorableError: a row has no value and `on_unscorable="raise"`.
    """
    values = [_behind_gate(score, reduction) for score in scores]
    assert all(value is None or math.isfinite(value) for value in values)
    if on_unscorable == "raise":
        for index, score in enumerate(scores):
            if score.error is not None:
                raise UnscorableError(
                    f"row {index} can't be scored: {score.error}. Mend the row, or pass cdr_on_unscorable='floor'."
                )
    if on_unscorable != "floor":
        return values
    names = [_CALL] * len(values) if groups is None else list(groups)
    worst: dict[Hashable, float] = {}
    for name, value in zip(names, values, strict=True):
        if value is not None:
            for key in (name, _CALL):
                worst[key] = min(value, worst.get(key, value))
    worst = lowest(worst)
    floors = [worst.get(name, worst.get(_CALL, 0.0)) - 1.0 for name in names]
    return [floor if value is None else value for floor, value in zip(floors, values, strict=True)]


def _behind_gate(score: Score, reduction: str) -> float | None:
    if score.value is None:
        return None
    if score.surprise is None:
        return gate(score.value, score.gated)
    return surprise_reward(
        score.value,
        surprise=score.surprise,
        survived=score.survival,
        n_tokens=score.n_tokens,
        is_cut_off=score.finished is False,
        reduction=reduction,
    )
