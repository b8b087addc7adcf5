"""Two models' per-token log-probabilities -> log-ratio, and whether to trust it. Pure: tensors in, numbers out."""

import math

from torch import Tensor

# float32 log-probabilities and entropies of one token are off by less, in nats.
_TOKEN_ROUNDING = 1e-4


def sum_logps(per_token_logps: Tensor) -> float:
    """
    Log-probability of a whole completion, summed in float64.

    Args:
        per_token_logps (`Tensor` of shape (T,)): Nats.

    Returns:
        `float`, nats.
    """
    return float(per_token_logps.double().sum())


def log_ratio(strong_logps: Tensor, weak_logps: Tensor, reduction: str) -> float:
    """
    The density-ratio reward (arXiv 2411.02481), `sum_t log p_strong(y_t | ...) - sum_t log p_weak(y_t | ...)`.

    Args:
        strong_logps (`Tensor` of shape (T_strong,)): The completion's tokens under the strong model, nats.
        weak_logps (`Tensor` of shape (T_weak,)): The same text's tokens under the weak model, nats. The two lengths
            differ where the tokenizers do.
        reduction (`str`): `"sum"`, the paper's reward; it is comparable between tokenizers. `"mean"`: each sum divided
            by its own number of tokens, in nats per token. Differs: the paper has no mean.

    Returns:
        `float`, nats (per token for `"mean"`).
    """
    strong, weak = sum_logps(strong_logps), sum_logps(weak_logps)
    if reduction == "mean":
        return strong / len(strong_logps) - weak / len(weak_logps)
    assert reduction == "sum", reduction
    return strong - weak


def typicality(statistics: Tensor) -> float:
    """
    How typical a completion is of the model, in standard deviations per token:

        sum_t [ log p(y_t) + H_t ] / sum_t s_t

    with H_t the entropy and s_t the standard deviation of -log p at position t. Where the model itself draws y_t,
    -log p(y_t) has the mean H_t, whatever the context: each term of the numerator then has the mean 0 and the scale
    s_t, and the whole is near 0 for the model's own samples, of any length and in any model. A text of tokens that the
    model finds unlikelier than its own lies below; one of its favourites lies above.
    Differs: the paper has no such thing; this is the package's own.

    Args:
        statistics (`Tensor` of shape (T, 3)): Log-probability, H and s of each token, nats; see `token_statistics`.

    Returns:
        `float`. Where every s is 0 the model is certain of each token (or knows nothing of any): 0 if the completion is
        what it is certain of, else minus infinity.
    """
    logps, entropies, spreads = statistics.double().unbind(1)  # (T,) each
    surplus, spread = float((logps + entropies).sum()), float(spreads.sum())
    if spread > 0:
        return surplus / spread
    return 0.0 if abs(surplus) <= _TOKEN_ROUNDING * len(statistics) else -math.inf


def gate(value: float, is_gated: bool) -> float:
    """
    The reward of a score: the log-ratio where the strong model finds the text typical, else at most -1.

    A ratio is unbounded where neither model knows the text. Such a text gets 1 nat less than its ratio, and than 0.

    Args:
        value (`float`): The log-ratio, nats.
        is_gated (`bool`): The typicality is below the bound.
    """
    return min(value, 0.0) - 1.0 if is_gated else value
