"""The weights that a module holds: whether they are all there, what tensors they are, and which.

Loads and runs nothing, and knows no checkpoint; `checkpoint` tells files apart.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


def is_whole(model: nn.Module) -> bool:
    """Whether this process has all of a model's weights, and no other has a part (FSDP, ZeRO-3, tensor parallelism)."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return False
    return not any(hasattr(each, "placements") or each.numel() == 0 for each in model.parameters())


def check_whole(model: nn.Module, role: str) -> None:
    """
    Raises:
        ModelError: the model is spread over processes.
    """
    if not is_whole(model):
        raise ModelError(
            f"{role} is spread over processes (FSDP, ZeRO-3, tensor parallelism), and each scores rows of its own, for "
            "which it needs all weights. Pass a name or a path, without tp_plan, or a model that was loaded before the "
            "trainer's arguments were made."
        )


def fingerprint(model: nn.Module) -> int:
    """
    A number that changes, for all that anyone can tell, when a weight does, and is the same in every process that has
    the same weights: of the sums of their bits as integers.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.inference_mode():
        parts = [part for parameter in model.parameters() for part in plain_tensors(parameter)]
        sums = [part.view(kinds[part.itemsize]).sum(dtype=torch.int64) for part in parts]
        return hash(tuple(torch.stack([each.cpu() for each in sums]).tolist()))


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that one is made of: torchao's wrap some, bitsandbytes' have some beside them."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
        return
    yield tensor.data
    state = getattr(tensor, "quant_state", None)
    beside = [getattr(tensor, "SCB", None), *(vars(state).values() if state is not None else ())]
    yield from (each for each in beside if isinstance(each, Tensor))
