"""Could the strong model have written this? An exact test, and the reward behind it. Pure: tensors in, numbers out.

With p the model's distribution at a position and q its distribution at temperature 2, q_v = sqrt(p_v) / Z with
Z = sum_v sqrt(p_v), the surprise of a token y is

    c = 2 log(q_y / p_y) = -log p_y - R,    R = 2 log Z    (the Renyi entropy of order 1/2)

If the model drew y itself, E exp(c / 2) = sum_v p_v q_v / p_v = 1, whatever came before. So exp(sum of c / 2), from any
position on, is a martingale that starts at 1, and by Ville's inequality it ever exceeds n / a with a probability of at
most a / n. A union over n positions to start from: of n tokens of the model's own, the largest sum over any window, C,
exceeds 2 log(n / a) with a probability of at most a (a (1 + log n) where the text chose its own length, up to n).
Survival: with e_t the probability of ending at t, prod 1 / (1 - e_t) over a text that has not ended is such a
martingale too, 0 once it has. So S = -sum log(1 - e_t) over all positions but that of a final end token exceeds
log(1 / a) with a probability of at most a. Nothing is assumed of tails, and no constant depends on the model, its
tokenizer or the length. Differs: the paper has no such thing; this is the package's own.

Neighbours: `logps` runs the head and hands over its logits; `ratio` has the typicality gate.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LEVEL = 0.01
"""a: the probability at most with which a completion of the strong model's own is found to be none."""
_SURVIVAL_BOUND = math.log(1 / _LEVEL)

# What the experiment in examples/RESULTS.md decides: the share of C that every completion pays, and whether one that
# was cut off may have a positive reward.
_SHARE = 0.25
_CAPS_UNFINISHED = False

# The largest float32 below 1 is 1 - 2**-24: an end that is certain counts as 16.6 nats.
_LARGEST = 1 - 2**-24


def surprise_statistics(logits: Tensor, targets: Tensor, *, end_ids: Sequence[int]) -> Tensor:
    """
    Of each target its log-probability, its surprise c, and what going on at its position adds to S.

    Args:
        logits (`Tensor` of shape (N, V)): Any floating type.
        targets (`Tensor` of shape (N,)): Token ids.
        end_ids (`Sequence[int]`): Where the model ends a text.

    Returns:
        `Tensor` of shape (N, 3), float32, nats; (N, 2) without `end_ids`.
    """
    logps = logits.float().log_softmax(dim=-1)  # (N, V), shifted by the maximum inside
    # To the bit what `token_logps` gives for the other model of a pair: equal models have the ratio 0.
    own = logps.gather(1, targets[:, None]).squeeze(1)  # (N,)
    ends = [logps[:, id].exp() for id in end_ids]  # (N,) each
    renyi = 2 * logps.mul_(0.5).exp_().sum(dim=-1).log()  # (N,)
    columns = [own, -own - renyi]
    if ends:
        columns.append(-torch.log1p(-torch.stack(ends).sum(dim=0).clamp(max=_LARGEST)))
    return torch.stack(columns, dim=1)


def largest_window(surprises: Tensor) -> float:
    """
    C: the largest sum over consecutive tokens, in float64; 0 where every token is likelier than its company.

    Args:
        surprises (`Tensor` of shape (T,)): c of each token, nats.
    """
    sums = torch.cat([surprises.new_zeros(1), surprises]).double().cumsum(0)  # (T + 1,)
    return float((sums - sums.cummin(0).values).max())


def survival(terms: Tensor, *, is_finished: bool) -> float:
    """
    S: how far the text went on where the model would have ended it, nats.

    Args:
        terms (`Tensor` of shape (T,)): What each position adds.
        is_finished (`bool`): The last token ended the text: its position adds nothing.
    """
    return float(terms[: len(terms) - is_finished].double().sum())


def is_foreign(surprise: float, survived: float | None, n_tokens: int) -> bool:
    """
    Whether the strong model would hardly have written this: C > 2 log(n / a) or S > log(1 / a), with a = 0.01.

    Args:
        surprise (`float`): C, nats.
        survived (`float` or `None`): S, nats; `None` where the model has no end token.
        n_tokens (`int`): n.
    """
    return surprise > 2 * math.log(n_tokens / _LEVEL) or _outlives(survived)


def surprise_reward(
    value: float, *, surprise: float, survived: float | None, n_tokens: int, is_cut_off: bool, reduction: str
) -> float:
    """
    The reward of a score: the log-ratio less what the completion surprises the strong model by.

        r' = r - C / 4,    x = max(0, C - 2 log n) + S where S > log(1 / a)
        reward = min(r', 0) - x where the text is foreign to the strong model, else r' - x

    A ratio is unbounded where neither model knows the text, and C grows with it there.

    Args:
        value (`float`): The log-ratio r, nats.
        surprise (`float`): C, nats.
        survived (`float` or `None`): S, nats; `None` where the model has no end token.
        n_tokens (`int`): n, the strong model's.
        is_cut_off (`bool`): The policy is known not to have ended its turn.
        reduction (`str`): Of the value. `"mean"` is in nats per token, and so is then what is taken off.
    """
    excess = max(0.0, surprise - 2 * math.log(n_tokens))
    if survived is not None and _outlives(survived):
        excess += survived
    unit = n_tokens if reduction == "mean" else 1
    less = value - _SHARE * surprise / unit
    if is_foreign(surprise, survived, n_tokens) or (_CAPS_UNFINISHED and is_cut_off):
        less = min(less, 0.0)
    return less - excess / unit


def _outlives(survived: float | None) -> bool:
    return survived is not None and survived > _SURVIVAL_BOUND
