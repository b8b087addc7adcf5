"""What the pair says of one completion: the record, and how two models' log-probabilities become one.

Runs no model; `scorer` hands over what the models gave.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .gate import examine
from .ratio import log_ratio, sum_logps
from .types import Row


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
        surprise (`float` or `None`): C, how much the completion surprises the strong model where it does so most, nats:
            for n tokens of its own above 2 log(n / 0.01) once in a hundred times at most. `None` with another
            `cdr_gate`.
        survival (`float` or `None`): S, how far the completion goes on where the strong model would have ended it,
            nats: for its own above 4.6 once in a hundred times at most. `None` with another `cdr_gate`, or without an
            end token.
        typicality (`float` or `None`): How typical the completion is of the strong model, in standard deviations per
            token: about 0 for its own samples, far below for what it does not know. `None` with another `cdr_gate`.
        gated (`bool`): The strong model would hardly have written the completion, so the value is not to be trusted as
            a reward. It is the plain log-ratio all the same.
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
    surprise: float | None = None
    survival: float | None = None
    typicality: float | None = None
    gated: bool = False
    truncated: bool = False
    per_token: Tensor | None = field(default=None, repr=False, compare=False)
    error: str | None = None


def score_from_logps(
    rows: tuple[Row, Row],
    strong: Tensor,
    weak_logps: Tensor,
    *,
    reduction: str,
    gate: str,
    least_typicality: float,
    finished: bool | None,
    shares_vocabulary: bool,
) -> Score:
    """
    What two models gave for one completion -> its score.

    Args:
        rows (`tuple[Row, Row]`): The completion as strong and weak read it.
        strong (`Tensor` of shape (T,) or (T, ...)): Log-probabilities under the strong model, or the statistics that
            the gate needs, of which they are the first, nats.
        weak_logps (`Tensor` of shape (T_weak,)): Log-probabilities under the weak model, nats.
        reduction (`str`): See `log_ratio`.
        gate (`str`): `cdr_gate`.
        least_typicality (`float`): Below it the score is gated by `"typicality"`.
        finished (`bool` or `None`): The completion's last token ended it.
        shares_vocabulary (`bool`): A token id means the same to both models.
    """
    strong_logps = strong if strong.ndim == 1 else strong[:, 0]
    for role, logps in (("strong", strong_logps), ("weak", weak_logps)):
        broken = (~logps.isfinite()).nonzero()
        if len(broken):
            index = int(broken[0])
            return Score(
                None,
                error=f"{role} gave the log-probability {float(logps[index])} at completion token {index}: its weights "
                "are broken or its dtype overflows. Try cdr_dtype='float32', of a server its --dtype",
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
        **examine(strong, gate=gate, least_typicality=least_typicality, finished=finished),
    )
