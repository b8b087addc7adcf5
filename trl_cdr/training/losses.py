"""Log-probabilities of pairs -> preference losses. Pure: tensors in, tensors out; the trainer runs the models.

P is the number of pairs. A loss is a number for each pair; whoever calls weighs and averages them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Logits of which a float32 copy exists at one time, 32 MiB of them: little beside the logits of any pair.
_LOGITS_PER_CHUNK = 2**23


class TokenLogps(NamedTuple):
    """
    What a model thinks of tokens.

    Attributes:
        logps (`Tensor` of shape (B, T)): Each token's log-probability, float32, nats.
        entropies (`Tensor` of shape (B, T)): Of the distribution that the token was one of; float32, nats, without
            gradient.
    """

    logps: Tensor
    entropies: Tensor


def gather_logps(logits: Tensor, ids: Tensor) -> TokenLogps:
    """
    Log-probabilities of tokens, in float32 whatever the model's type.

    For the backward pass the logits are kept as they are, and a float32 copy exists of a chunk at a time only.

    Args:
        logits (`Tensor` of shape (B, T + 1, V)): What the model predicts for each token, and for what would follow,
            which is not looked at: to cut it off would cost a copy of all in the backward pass.
        ids (`Tensor` of shape (B, T)): The tokens.

    Returns:
        `TokenLogps`.
    """
    return TokenLogps(*_GatherLogps.apply(logits, ids))  # type: ignore[no-untyped-call]


class _GatherLogps(torch.autograd.Function):
    """`log_softmax` and `gather`, and the entropy; the softmax is computed anew where gradients need it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logps, normalizers, entropies = (torch.empty(ids.shape, device=ids.device) for _ in range(3))  # (B, T) each
        for at in _chunks(logits, ids):
            scores = logits[at].float()  # (n, V)
            normalizers[at] = scores.logsumexp(dim=1)
            logps[at] = scores.gather(1, ids[at][:, None])[:, 0] - normalizers[at]
            entropies[at] = torch.special.entr((scores - normalizers[at][:, None]).exp_()).sum(dim=1)
        ctx.save_for_backward(logits, ids, normalizers)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, ids, normalizers = ctx.saved_tensors
        gradient = gradients[0].float()  # (B, T)
        found = torch.empty_like(logits)
        found[:, ids.shape[1] :] = 0
        for at in _chunks(logits, ids):
            # d logp / d logits = onehot - softmax
            chunk = (logits[at].float() - normalizers[at][:, None]).exp_().mul_(-gradient[at][:, None])  # (n, V)
            found[at] = chunk.scatter_add_(1, ids[at][:, None], gradient[at][:, None])
        return found, None


def _chunks(logits: Tensor, ids: Tensor) -> Iterator[tuple[int, slice]]:
    """Row and positions of one chunk after the other."""
    step = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])
    for row in range(len(ids)):
        for start in range(0, ids.shape[1], step):
            yield row, slice(start, min(start + step, ids.shape[1]))


def simpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """
    SimPO's loss (arXiv 2405.14734, equation 6), `-log sigmoid(beta * (chosen - rejected) - gamma)`.

    Args:
        chosen_logps, rejected_logps (`Tensor` of shape (P,)): Mean log-probability of a completion's tokens, its end
            token among them, nats per token.
        beta (`float`): Scale.
        gamma (`float`): The margin that is asked for, after scaling: TRL's `simpo_gamma`, the paper's gamma.
        label_smoothing (`float`, *optional*, defaults to 0): Probability that a label is the wrong way round; that
            share of the loss is the turned pair's. Differs: SimPO's paper has none; this is TRL's.

    Returns:
        `Tensor` of shape (P,).
    """
    return _smooth(beta * (chosen_logps - rejected_logps) - gamma, label_smoothing)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """
    DPO's loss (arXiv 2305.18290, equation 7), with `label_smoothing` the conservative one:
    `-log sigmoid(beta * [(chosen - ref_chosen) - (rejected - ref_rejected)])`.

    Args:
        chosen_logps, rejected_logps (`Tensor` of shape (P,)): Log-probability of a whole completion, nats.
        ref_chosen_logps, ref_rejected_logps (`Tensor` of shape (P,)): The same under the reference.
        beta (`float`): How strongly the policy is held to the reference.
        label_smoothing (`float`, *optional*, defaults to 0): See `simpo_loss`.

    Returns:
        `Tensor` of shape (P,).
    """
    gap = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return _smooth(beta * gap, label_smoothing)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """
    IPO's loss (arXiv 2310.12036, equation 17, whose tau is `beta`),
    `([(chosen - ref_chosen) - (rejected - ref_rejected)] - 1 / (2 * beta)) ** 2`.
    Differs: log-probabilities are means over tokens, as in TRL; the paper writes sums.

    Args:
        chosen_logps, rejected_logps (`Tensor` of shape (P,)): Mean log-probability of a completion's tokens, nats per
            token.
        ref_chosen_logps, ref_rejected_logps (`Tensor` of shape (P,)): The same under the reference.
        beta (`float`): The larger, the smaller the gap that is aimed at.

    Returns:
        `Tensor` of shape (P,).
    """
    gap = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (gap - 1 / (2 * beta)) ** 2


def _smooth(logits: Tensor, label_smoothing: float) -> Tensor:
    loss: Tensor = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return loss
