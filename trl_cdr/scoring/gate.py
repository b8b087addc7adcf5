"""Which gate: what it keeps of the strong model's logits, and what it finds of a completion. Pure.

`ratio` and `surprise` have the formulas, `rewards` makes rewards of what is found.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .logps import Reduce, token_logps, token_statistics
from .ratio import typicality
from .surprise import is_foreign, largest_window, surprise_statistics, survival


def gate_statistics(gate: str, end_ids: Sequence[int]) -> Reduce:
    """
    What is kept of the strong model's logits: log-probabilities first, then what the gate needs.

    Args:
        gate (`str`): `cdr_gate`.
        end_ids (`Sequence[int]`): Where the strong model ends a text; without any there is no survival.
    """
    if gate == "surprise":
        return partial(surprise_statistics, end_ids=end_ids)
    return token_statistics if gate == "typicality" else token_logps


def examine(statistics: Tensor, *, gate: str, least_typicality: float, finished: bool | None) -> dict[str, Any]:
    """
    What the gate finds of a completion.

    Args:
        statistics (`Tensor` of shape (T,) or (T, ...)): What `gate_statistics` kept, finite.
        gate (`str`): `cdr_gate`.
        least_typicality (`float`): Below it `"typicality"` closes.
        finished (`bool` or `None`): The completion's last token ended it.

    Returns:
        `dict`: Fields of [`Score`]: `gated`, and what it is decided by.
    """
    if gate == "none":
        return {}
    if gate == "typicality":
        found = typicality(statistics)
        return {"typicality": found, "gated": found < least_typicality}
    surprise = largest_window(statistics[:, 1])
    survived = survival(statistics[:, 2], is_finished=finished is True) if statistics.shape[1] == 3 else None
    return {"surprise": surprise, "survival": survived, "gated": is_foreign(surprise, survived, len(statistics))}
