"""Hidden states + head -> what is known of each predicted token, in chunks. Pure; `causal_lm` supplies both."""

from collections.abc import Callable

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor, Tensor], Tensor]  # (n, V) logits and their (n,) targets -> (n, ...) float32

# Logits that exist at one time. 2**23 float32 values are 32 MiB, and as much again inside the log_softmax. Larger
# chunks were no faster on a CPU, and neither was torch's own chunked linear_cross_entropy.
LOGITS_PER_CHUNK = 2**23

# exp of less is 0 in float32, so that it adds nothing to an expectation; the logarithm itself may be -inf.
_LEAST_LOGP = -150.0
# Standard deviations below so many roundings of the log-probabilities that they are computed from are rounding too.
_ROUNDINGS = 16


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Log-probability of each target under its logits, computed in float32.

    Args:
        logits (`Tensor` of shape (N, V)): Any floating type.
        targets (`Tensor` of shape (N,)): Token ids.

    Returns:
        `Tensor` of shape (N,), float32, nats.
    """
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def token_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Log-probability of each target, and the mean and spread that log-probabilities have where the target was drawn.

    With q the distribution at a position: entropy `H = -sum_v q_v log q_v`, and the standard deviation `s` of
    `-log q_v` under q, from the centred square `sum_v q_v (log q_v + H)^2`. (The difference of two large means would be
    rounding for near-uniform and saturated positions.) Where s is below what float32 resolves it is 0.

    Args:
        logits (`Tensor` of shape (N, V)): Any floating type.
        targets (`Tensor` of shape (N,)): Token ids.

    Returns:
        `Tensor` of shape (N, 3), float32, nats: the target's log-probability, H, s.
    """
    logps = torch.log_softmax(logits.float(), dim=-1)  # (N, V)
    target_logps = logps.gather(1, targets[:, None])[:, 0]  # (N,)
    logps.clamp_(min=_LEAST_LOGP)
    probabilities = logps.exp()  # (N, V)
    entropies = -torch.linalg.vecdot(probabilities, logps)  # (N,)
    spreads = torch.linalg.vecdot(probabilities, logps.add_(entropies[:, None]).square_()).sqrt()  # (N,)
    resolution = _ROUNDINGS * torch.finfo(torch.float32).eps * (1 + entropies)
    return torch.stack([target_logps, entropies, spreads.where(spreads > resolution, 0)], dim=1)


def head_logps(hidden: Tensor, targets: Tensor, head: Head, *, vocab_size: int, reduce: Reduce = token_logps) -> Tensor:
    """
    Apply the head where a token is predicted, a chunk of positions at a time, and reduce each chunk at once.

    At most `LOGITS_PER_CHUNK` logits exist together, whatever N is; a (B, T, V) tensor never does.

    Args:
        hidden (`Tensor` of shape (N, H)): Hidden states at the predicting positions.
        targets (`Tensor` of shape (N,)): The tokens that they predict.
        head (`Callable`): (n, H) -> (n, V) logits, scaling and soft-capping included.
        vocab_size (`int`): V.
        reduce (`Callable`, *optional*, defaults to `token_logps`): What becomes of a chunk; or `token_statistics`.

    Returns:
        `Tensor` of shape (N,), float32, nats; (N, 3) with `token_statistics`.
    """
    step = max(1, LOGITS_PER_CHUNK // vocab_size)
    starts = range(0, len(targets), step) or [0]  # without targets one empty chunk, which has the right shape
    return torch.cat([reduce(head(hidden[start : start + step]), targets[start : start + step]) for start in starts])
