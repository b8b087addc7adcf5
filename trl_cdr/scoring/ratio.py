"""Two models' per-token log-probabilities -> log-ratio, reduced. Pure: tensors in, numbers out."""

from torch import Tensor


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
