"""The naive way to per-token log-probabilities, as common scoring scripts do it. The tests' oracle, and a baseline."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..scoring.types import Row


def naive_logps(
    model: Any, rows: Sequence[Row], *, batch_size: int = 1, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """
    Whole rows, padded on the right, all logits, `log_softmax` over the vocabulary at every position.

    Args:
        model: A causal language model.
        rows (`Sequence[Row]`): What to score.
        batch_size (`int`, *optional*, defaults to 1): Rows of a forward, in the order given.
        dtype (`torch.dtype`, *optional*): Type of the log_softmax; the logits' own if `None`.

    Returns:
        `list[Tensor]`: (C,) nats for each row, on the CPU.
    """
    results = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            longest = max(len(row.ids) for row in batch)
            ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in batch], device=model.device)
            mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch])
            logits = model(input_ids=ids, attention_mask=mask.to(model.device), use_cache=False).logits  # (B, T, V)
            logps = logits.to(dtype or logits.dtype).log_softmax(-1)  # (B, T, V)
            for row, row_logps in zip(batch, logps, strict=True):
                targets = torch.tensor(row.completion_ids, device=model.device)  # (C,)
                results.append(row_logps[row.predicting].gather(1, targets[:, None]).squeeze(1).cpu())
    return results
