"""Log-probabilities of pairs -> preference losses. Pure: tensors in, tensors out; the trainer runs the models.

P is the number of pairs. A loss is a number for each pair; whoever calls weighs and averages them.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def gather_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """
    Log-probabilities of tokens, in float32 whatever the model's type.

    Args:
        logits (`Tensor` of shape (B, T, V)): What the model predicts for each token.
        ids (`Tensor` of shape (B, T)): The tokens.

    Returns:
        `Tensor` of shape (B, T), float32, nats.
    """
    # Row by row: of a second tensor of the logits' size only one row is alive at a time.
    rows = []
    for row, tokens in zip(logits, ids, strict=True):
        scores = row.float()  # (T, V)
        rows.append(scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(dim=1))
    return torch.stack(rows)


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
