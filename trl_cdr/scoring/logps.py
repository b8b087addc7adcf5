"""Hidden states + head -> what is known of each predicted token, in chunks. Pure; `causal_lm` supplies both."""

from collections.abc import Callable

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor, Tensor], Tensor]  # (n, V) logits and their (n,) targets -> (n, ...) float32

# Logits that exist at one time, and as many again inside the log_softmax. 2**23 float32 values are 32 MiB; larger
# chunks were no faster on a CPU, and neither was torch's own chunked linear_cross_entropy. An accelerator reads the
# whole head for each chunk: 256 MiB are 440 positions of a vocabulary of 152k, enough to keep its processors busy.
CPU_LOGITS = 2**23
ACCELERATOR_LOGITS = 2**26
# A CPU reduces a chunk in blocks of 2 MiB, which stay in its caches: the statistics take a fifth of the time.
_CACHED_LOGITS = 2**19

# exp of less is 0 in float32, so that it adds nothing to an expectation; the logit itself may be -inf.
_LEAST_LOGIT = -150.0
# Standard deviations below so many roundings of the log-probabilities that they are computed from are rounding too.
_ROUNDINGS = 16


def logits_per_chunk(device: torch.device) -> int:
    """Logits that exist together on a device, at most; more only where one position has more."""
    return CPU_LOGITS if device.type == "cpu" else ACCELERATOR_LOGITS


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
    rounding for near-uniform and saturated positions.) Where s is below what float32 resolves it is 0. As log q is x
    minus a constant, with x the logits, both come from the mean of x under q.

    Args:
        logits (`Tensor` of shape (N, V)): Any floating type.
        targets (`Tensor` of shape (N,)): Token ids.

    Returns:
        `Tensor` of shape (N, 3), float32, nats: the target's log-probability, H, s.
    """
    logits = logits.float()
    top = logits.amax(dim=-1, keepdim=True)  # (N, 1)
    shifted = (logits - top).clamp_(min=_LEAST_LOGIT)  # (N, V)
    probabilities = shifted.softmax(dim=-1)  # (N, V)
    log_sum = -probabilities.amax(dim=-1).log()  # (N,) of exp(logits - top)
    means = torch.linalg.vecdot(probabilities, shifted)  # (N,)
    spreads = torch.linalg.vecdot(probabilities, shifted.sub_(means[:, None]).square_()).sqrt()  # (N,)
    entropies = log_sum - means  # (N,)
    resolution = _ROUNDINGS * torch.finfo(torch.float32).eps * (1 + entropies)
    # To the bit what the other model of a pair gives: equal models have the ratio 0.
    return torch.stack([token_logps(logits, targets), entropies, spreads.where(spreads > resolution, 0)], dim=1)


def head_logps(hidden: Tensor, targets: Tensor, head: Head, *, vocab_size: int, reduce: Reduce = token_logps) -> Tensor:
    """
    Apply the head where a token is predicted, a chunk of positions at a time, and reduce each chunk at once.

    At most `logits_per_chunk` logits exist together, whatever N is; a (B, T, V) tensor never does.

    Args:
        hidden (`Tensor` of shape (N, H)): Hidden states at the predicting positions.
        targets (`Tensor` of shape (N,)): The tokens that they predict.
        head (`Callable`): (n, H) -> (n, V) logits, scaling and soft-capping included.
        vocab_size (`int`): V.
        reduce (`Callable`, *optional*, defaults to `token_logps`): What becomes of a chunk; or `token_statistics`.

    Returns:
        `Tensor` of shape (N,), float32, nats; (N, 3) with `token_statistics`.
    """
    step = max(1, logits_per_chunk(hidden.device) // vocab_size)
    block = max(1, _CACHED_LOGITS // vocab_size) if hidden.device.type == "cpu" else step
    pieces = []
    for start in range(0, len(targets), step) or [0]:  # without targets one empty chunk, which has the right shape
        logits = head(hidden[start : start + step])  # (n, V)
        blocks = zip(torch.split(logits, block), torch.split(targets[start : start + step], block), strict=True)
        pieces += [reduce(*each) for each in blocks]
    return torch.cat(pieces)
