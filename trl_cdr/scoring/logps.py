"""Hidden states + head -> per-token log-probabilities, in chunks. Pure; `causal_lm` supplies both."""

from collections.abc import Callable

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]

# Logits that exist at one time. 2**23 float32 values are 32 MiB, and as much again inside the log_softmax. Larger
# chunks were no faster on a CPU, and neither was torch's own chunked linear_cross_entropy.
LOGITS_PER_CHUNK = 2**23


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


def head_logps(hidden: Tensor, targets: Tensor, head: Head, *, vocab_size: int) -> Tensor:
    """
    Apply the head where a token is predicted, a chunk of positions at a time, and reduce each chunk at once.

    At most `LOGITS_PER_CHUNK` logits exist together, whatever N is; a (B, T, V) tensor never does.

    Args:
        hidden (`Tensor` of shape (N, H)): Hidden states at the predicting positions.
        targets (`Tensor` of shape (N,)): The tokens that they predict.
        head (`Callable`): (n, H) -> (n, V) logits, scaling and soft-capping included.
        vocab_size (`int`): V.

    Returns:
        `Tensor` of shape (N,), float32, nats.
    """
    step = max(1, LOGITS_PER_CHUNK // vocab_size)
    pieces = [
        token_logps(head(hidden[start : start + step]), targets[start : start + step])
        for start in range(0, len(targets), step)
    ]
    return torch.cat(pieces) if pieces else hidden.new_empty(0, dtype=torch.float32)
