"""Score -> reward: the log-ratio behind the gate that the score was made with. Pure; runs no model.

`ratio` and `surprise` have the formulas; `training.reward` hands the rewards to TRL, `annotation.probe` attacks them.
"""

import math
from collections.abc import Callable, Sequence

from ..errors import UnscorableError
from .ratio import gate
from .score import Score
from .surprise import surprise_reward


def rewards_from_scores(
    scores: Sequence[Score],
    *,
    on_unscorable: str,
    reduction: str = "sum",
    lowest: Callable[[float], float] = float,
) -> list[float | None]:
    """
    Turn scores into rewards: the log-ratio behind the gate that they were made with, see `ratio.gate` and
    `surprise.surprise_reward`.

    Args:
        scores (`Sequence[Score]`): One call's.
        on_unscorable (`str`): For a row without a value. `"floor"`: the worst finite reward of the call minus 1 nat, or
            -1 where there is none, for trainers that read a missing reward as 0, which would win against honest
            negative log-ratios. The row is then the one to be rejected. `"none"`: `None`. `"raise"`: stop.
        reduction (`str`, *optional*, defaults to `"sum"`): Of the scores.
        lowest (`Callable[[float], float]`, *optional*): Of what the calls of a step have as their worst reward (inf:
            none) the lowest, where a step is several calls, one for each process. By default a step is this call.

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
    worst = lowest(min((value for value in values if value is not None), default=math.inf))
    floor = (worst if math.isfinite(worst) else 0.0) - 1.0
    return [floor if value is None else value for value in values]


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
