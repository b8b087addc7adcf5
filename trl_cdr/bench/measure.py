"""Seconds, peak memory and the machine's matrix rate. Knows nothing of scoring."""

import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers

MB = 2**20


@dataclass(frozen=True)
class Cost:
    """Seconds of each run (the first is cold), and the first one's peak memory above its start in MB (2**20)."""

    seconds: tuple[float, ...]
    peak_mb: float

    @property
    def cold(self) -> float:
        """Seconds of the first run."""
        return self.seconds[0]

    @property
    def warm(self) -> float:
        """Median seconds of the runs after the first; of the first where it is the only one."""
        return statistics.median(self.seconds[1:] or self.seconds)


def measure(run: Callable[[], object], *, device: str, runs: int) -> Cost:
    """Call `run` once and then `runs` times more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        sampler = _MemorySampler()
        sampler.start()
    seconds = [_time(run, device)]
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else sampler.stop()
    seconds += [_time(run, device) for _ in range(runs)]
    return Cost(tuple(seconds), peak / MB)


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


def _time(run: Callable[[], object], device: str) -> float:
    _synchronize(device)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _MemorySampler(threading.Thread):
    """The process's resident memory, read every millisecond: its highest value above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._start: int = self._process.memory_info().rss
        self._peak = self._start
        self._is_done = threading.Event()

    def run(self) -> None:
        while not self._is_done.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._is_done.set()
        self.join()
        above: int = self._peak - self._start
        return above
