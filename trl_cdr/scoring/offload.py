"""Where a pair's weights are between calls, and whose turn it is to be awake. Runs nothing; `causal_lm` does.

A pair that sleeps leaves its device to others: to the policy's update, or to vLLM in the trainer's own process, which
TRL puts to sleep before rewards are computed and wakes for the weights' update and the next generation.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from .. import _compat
from ..errors import ConfigError, ModelError
from .checkpoint import identify_weights
from .loading import load_model

# The host's page-locked memory is handed out in powers of two: one block for each weight could take twice its size.
BLOCK = 2**28


class Bed(Protocol):
    """A place for a model's weights to sleep. Weights that fail to wake are asleep still."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Turns:
    """
    Whose weights are awake: at most one model's at a time, and nobody's outside of a call. Whoever uses it holds the
    pair's lock; a model without a bed is always awake.
    """

    def __init__(self) -> None:
        self._awake: Bed | None = None
        self._on_sleep: list[Callable[[], None]] = []
        self._depth = 0
        self._spent = threading.local()  # threads that wait for the lock do not move weights

    @property
    def seconds(self) -> float:
        """What this thread has spent on waking models and putting them to sleep, since it began."""
        return getattr(self._spent, "seconds", 0.0)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within it models may wake; at the end of the outermost one all are asleep, also where it failed."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.sleep()

    def add(self, bed: Bed, on_sleep: Callable[[], None]) -> None:
        """
        Take in a model that was just loaded and is awake.

        Args:
            bed (`Bed`): Where its weights sleep; of several models that stand on the same ones, the same.
            on_sleep (`Callable`): Frees what else of it is on the device; called whenever a model goes to sleep.
        """
        if self._awake is not bed:
            self.sleep()
        self._awake = bed
        self._on_sleep.append(on_sleep)

    def clear(self) -> None:
        """Forget all models: they are let go."""
        self._awake = None
        self._on_sleep.clear()

    def wake(self, bed: Bed) -> None:
        """Have a model's weights awake, and no other's."""
        if self._awake is bed:
            return
        self.sleep()
        with self._timed():
            bed.wake()
        self._awake = bed

    def sleep(self) -> None:
        """Put to sleep who is awake, and leave the memory to others."""
        if self._awake is None:
            return
        with self._timed():
            self._awake.sleep()
            self._awake = None
            for free in self._on_sleep:
                free()
            clear_device_cache()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent.seconds = self.seconds + time.perf_counter() - started


class OnHost:
    """
    Asleep in the host's memory, page-locked where the device is an accelerator.

    The copy there is made when the weights first go to sleep, and kept: nobody changes them, so that from then on
    falling asleep only lets go of them.

    Args:
        model (`nn.Module`): Its parameters move; its buffers, which are small, stay.
        role (`str`): `"strong"` or `"weak"`, for messages.

    Raises:
        ModelError: by `sleep` and `wake`: the host's memory, or the device's, does not hold the weights.
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        self._parameters = list(model.parameters())  # one that serves twice is here once
        self._role = role
        self._strides = [parameter.stride() for parameter in self._parameters]
        self._blocks: list[Tensor] = []

    def sleep(self) -> None:
        if not self._blocks:
            self._blocks = self._copy()
        _let_go(self._parameters)

    def wake(self) -> None:
        with torch.inference_mode(False), self._enough("the device's memory does not hold it"):
            weights = [
                torch.empty_strided(each.shape, stride, dtype=each.dtype, device=each.device)
                for each, stride in zip(self._parameters, self._strides, strict=True)
            ]
            for piece, block, offset in _pieces(weights):
                piece.copy_(self._blocks[block][offset : offset + len(piece)], non_blocking=True)
            _synchronize(self._parameters)
            for parameter, data in zip(self._parameters, weights, strict=True):
                parameter.data = data

    def _copy(self) -> list[Tensor]:
        total = sum(each.numel() * each.element_size() for each in self._parameters)
        is_pinned = self._parameters[0].device.type in ("cuda", "xpu")
        with torch.inference_mode(False), self._enough("the host's memory does not hold it"):
            blocks = [
                torch.empty(min(BLOCK, total - start), dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
                for start in range(0, total, BLOCK)
            ]
            for piece, block, offset in _pieces(each.data for each in self._parameters):
                blocks[block][offset : offset + len(piece)].copy_(piece, non_blocking=True)
            _synchronize(self._parameters)
        return blocks

    @contextmanager
    def _enough(self, otherwise: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _compat.is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self._role} can't be moved for cdr_offload='cpu': {otherwise} ({' '.join(str(error).split())}). "
                "Leave it more memory (of a GPU's, vllm_gpu_memory_utilization takes a share), or pass another "
                "cdr_offload or cdr_device."
            ) from error


class OnDisk:
    """
    Asleep in the checkpoint alone, from which the weights are loaded again.

    Args:
        model (`nn.Module`): Its parameters are let go.
        reload (`Callable`): Loads the same model once more.
    """

    def __init__(self, model: nn.Module, reload: Callable[[], nn.Module]) -> None:
        self._parameters = dict(model.named_parameters())
        self._reload = reload

    def sleep(self) -> None:
        _let_go(self._parameters.values())

    def wake(self) -> None:
        with torch.inference_mode(False):
            weights = dict(self._reload().named_parameters())
            for name, parameter in self._parameters.items():
                parameter.data = weights[name].data


def reload_model(name: str, role: str, *, weights: str, **loading: Any) -> nn.Module:
    """
    The very model that was loaded before.

    Args:
        name, role: As for `load_model`.
        weights (`str`): Which weights they were; see `identify_weights`.
        **loading: `load_model`'s.

    Raises:
        ModelError: the folder holds other weights by now, or can't be loaded any more.
    """
    kind, digest = weights.split()
    given: Mapping[str, Any] = loading.pop("init_kwargs", None) or {}
    if kind == "commit":  # the files are here, and a branch may have moved on
        given = {**given, "local_files_only": True, **({} if digest == "None" else {"revision": digest})}
    elif identify_weights(name, role, revision=loading.get("revision"), init_kwargs=given) != weights:
        raise ModelError(
            f"{role} is {name!r}, whose files have changed since it was loaded, and with cdr_offload='disk' it sleeps "
            "in them. Put them back, or call unload() to score with what is there now."
        )
    is_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar for each call of a trainer says nothing
    try:
        model: nn.Module = load_model(name, role, init_kwargs=given, **loading)
    finally:
        if is_shown:
            transformers_logging.enable_progress_bar()
    return model


def has_own_memory(device: torch.device) -> bool:
    """Whether there is a memory beside the device's to sleep in."""
    return device.type != "cpu"


def check_movable(offload: str, role: str, name: str, config: PretrainedConfig) -> None:
    """
    What a checkpoint's config says against moving its weights.

    Args:
        offload (`str`): `cdr_offload`.
        role, name (`str`): `"strong"` or `"weak"`, and its name or path, for the message.
        config (`PretrainedConfig`): The checkpoint's.

    Raises:
        ConfigError: it is quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"cdr_offload is {offload!r}, and {role} ({name}) is quantised: what libraries make of such weights can't "
            "be moved. Leave cdr_offload out, or use a checkpoint that is not quantised."
        )


def _let_go(parameters: Iterable[nn.Parameter]) -> None:
    """Size, type and device stay; the weights become one NaN, so that nobody takes them for weights."""
    with torch.inference_mode(False):
        for parameter in parameters:
            nothing = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device)
            parameter.data = nothing.expand(parameter.shape)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """The bytes of dense tensors in order, cut where a block ends: each piece with its block and its place there."""
    position = 0
    for tensor in tensors:
        rest = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        while len(rest):
            block, offset = divmod(position, BLOCK)
            piece, rest = rest[: BLOCK - offset], rest[BLOCK - offset :]
            position += len(piece)
            yield piece, block, offset


def _synchronize(parameters: Iterable[nn.Parameter]) -> None:
    """Wait for what a device still copies, so that waking is timed whole."""
    for device in {parameter.device for parameter in parameters}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
