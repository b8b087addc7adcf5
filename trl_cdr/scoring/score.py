"""What the pair says of one completion: the record, and how two models' log-probabilities become one.

Runs no model; `scorer` hands over what the models gave.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .encoding import Row
from .ratio import log_ratio, sum_logps


@dataclass(frozen=True, slots=True)
class Score:
    """
    What the pair says of one completion.

    Attributes:
        value (`float` or `None`): The log-ratio after the reduction, nats (nats per token for `mean`); `None` where it
            can't be computed.
        strong_logps, weak_logps (`float` or `None`): Log-probability of the whole completion under each model, nats.
        n_tokens (`int`): Completion tokens, end token included, as the strong model's tokenizer counts them; 0 where
            there is no score.
        domain (`str` or `None`): The domain whose criteria the models were shown; without criteria, as given.
        finished (`bool` or `None`): The policy ended its turn (the end token was scored), was cut off, or nobody knows.
        truncated (`bool`): The prompt lost tokens on its left, for at least one of the models.
        per_token (`Tensor` of shape (T,) or `None`): Log-ratio of each completion token, nats, float32 on the CPU;
            where both models read the same tokens.
        error (`str` or `None`): Why there is no value.
    """

    value: float | None
    strong_logps: float | None = None
    weak_logps: float | None = None
    n_tokens: int = 0
    domain: str | None = None
    finished: bool | None = None
    truncated: bool = False
    per_token: Tensor | None = field(default=None, repr=False, compare=False)
    error: str | None = None


def score_from_logps(
    rows: tuple[Row, Row], strong_logps: Tensor, weak_logps: Tensor, *, reduction: str, shares_vocabulary: bool
) -> Score:
    """Two models' per-token log-probabilities of one completion -> its score."""
    for role, logps in (("strong", strong_logps), ("weak", weak_logps)):
        broken = (~logps.isfinite()).nonzero()
        if len(broken):
            index = int(broken[0])
            return Score(
                None,
                error=f"{role} gave the log-probability {float(logps[index])} at completion token {index}: its weights "
                "are broken or its dtype overflows. Try cdr_dtype='float32'",
            )
    strong_row, weak_row = rows
    reads_alike = shares_vocabulary and strong_row.completion_ids == weak_row.completion_ids
    return Score(
        value=log_ratio(strong_logps, weak_logps, reduction),
        strong_logps=sum_logps(strong_logps),
        weak_logps=sum_logps(weak_logps),
        n_tokens=len(strong_logps),
        truncated=strong_row.truncated or weak_row.truncated,
        per_token=strong_logps - weak_logps if reads_alike else None,
    )
