"""Seconds, peak memory and the machine's matrix rate. Knows nothing of scoring."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

MB = 2**20


@dataclass(frozen=True)
class Cost:
    """Seconds of each run (the first is cold), and the peak of memory allocated in the first, in MB (2**20)."""

    seconds: tuple[float, ...]
    peak_mb: float

    @property
    def cold(self) -> float:
        """Seconds of the first run."""
        return self.seconds[0]

    @property
    def warm(self) -> float:
        """Median seconds of the runs after the first; of the first where it is the only one."""
        return statistics.median(self._warm)

    def over(self, other: "Cost") -> float:
        """How many times longer than `other` it took, the median over the rounds in which both were run."""
        return statistics.median(x / y for x, y in zip(self._warm, other._warm, strict=True))

    @property
    def _warm(self) -> tuple[float, ...]:
        return self.seconds[1:] or self.seconds


def measure(ways: Mapping[str, Callable[[], object]], *, device: str, runs: int) -> dict[str, Cost]:
    """Call each way once, then all in turn `runs` times, so that a machine that changes its pace does so for all."""
    peaks, seconds = {}, {}
    for name, run in ways.items():
        peaks[name], cold = _measure_cold(run, device)
        seconds[name] = [cold]
    for _ in range(runs):
        for name, run in ways.items():
            seconds[name].append(_time(run, device))
    return {name: Cost(tuple(seconds[name]), peaks[name]) for name in ways}


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of five."""
    size = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def describe_machine(device: str) -> dict[str, Any]:
    """What a figure has to be read with."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _measure_cold(run: Callable[[], object], device: str) -> tuple[float, float]:
    """MB and seconds of a first run."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cold = _time(run, device)
        return (torch.cuda.max_memory_allocated() - before) / MB, cold
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cold = _time(run, device)
    return _peak_allocated(profiler) / MB, cold


def _time(run: Callable[[], object], device: str) -> float:
    _synchronize(device)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - started


def _peak_allocated(profiler: profile) -> int:
    """
    The most bytes that PyTorch's CPU allocator had handed out at a time, over those at the start.

    The CPU's counterpart of `torch.cuda.max_memory_allocated`. The process's resident memory would not do: the C
    library keeps what was freed for later, so that one and the same call reads as anything up to four times its need.
    """
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes), default=0)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
