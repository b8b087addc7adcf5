"""The weights that a module holds: whether they are all there, what tensors they are, and which.

Loads and runs nothing, and knows no checkpoint; `checkpoint` tells files apart.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

_BLOCK = 2**17  # words of 8 bytes: a block and two copies stay in a CPU's caches
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as a signed number


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
    Return a hash of a model's parameters: of every byte, its place, and each tensor's type and shape.

    It is the same in every process that has the same weights, on every device. Tensors are read where they are; 8 bytes
    of a megabyte reach the host.

    Args:
        model (`nn.Module`): The model.
    """
    digest = hashlib.sha256()
    with torch.inference_mode():
        parts = [part for parameter in model.parameters() for part in plain_tensors(parameter)]
        hashes = [_hash_blocks(part) for part in parts]
        for part, blocks in zip(parts, hashes, strict=True):  # all are computed before the host waits for the first
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(",".join(map(str, blocks.tolist())).encode())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def _hash_blocks(tensor: Tensor) -> Tensor:
    """The hashes of a tensor's blocks of a megabyte, int64, on its device."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # words have to begin at a multiple of their size
        flat = flat.clone()
    num_words = len(flat) // 8
    rest = torch.nn.functional.pad(flat[8 * num_words :], (0, -len(flat) % 8)).clone()
    places = torch.arange(1, min(_BLOCK, max(1, num_words)) + 1, device=flat.device)
    keys = _mix(places)
    hashes = []
    for words in (flat[: 8 * num_words].view(torch.int64), rest.view(torch.int64)):
        hashes += [_mix(block ^ keys[: len(block)]).sum() for block in torch.split(words, _BLOCK)]
    return torch.stack(hashes)


def _mix(words: Tensor) -> Tensor:
    """Mix the bits of 64-bit words, so that two exchanged words change the sum of all; overflow is intended."""
    words = words * _FACTOR
    return words ^ (words >> 32)


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
