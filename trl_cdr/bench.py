"""Benchmarks: what scoring costs, beside the naive way, in one run. `trl-cdr bench` prints what this measures.

Not a test: it asserts nothing, because a machine's speed is no property of the code. Knows the inside of `scoring`.
"""

import gc
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .scoring.causal_lm import CausalLM
from .scoring.encoding import Row

MB = 2**20


@dataclass(frozen=True)
class Cost:
    """What one way to the log-probabilities cost: seconds, and peak memory above the weights in MB (2**20 bytes)."""

    seconds: float
    peak_mb: float


def bench_head(device: str = "cpu") -> dict[str, Any]:
    """
    Score 16 rows of 512 tokens (64 of prompt) with a random Llama of 58M parameters and a vocabulary of 32,000.

    Ours applies the head where a completion token is predicted, in chunks. The naive way, as in common scoring scripts,
    takes the logits of the whole padded batch and their float32 log_softmax.

    Returns:
        `dict`: `ours` and `naive` (each `seconds` and `peak_mb`), `max_difference` (nats per token), `weights_mb`,
        `settings`.
    """
    model = _llama(device)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(32_000, (16, 512), generator=generator).tolist()
    rows = [Row(tuple(ids[:64]), tuple(ids[64:])) for ids in draw]
    lm = CausalLM(model, "strong")
    lm.per_token_logps(rows[:1], token_budget=8192)  # the load-time check and the libraries' own buffers come first
    ours, logps = _measure(lambda: torch.stack(lm.per_token_logps(rows, token_budget=8192)), device)
    naive, expected = _measure(lambda: _naive_logps(model, rows), device)
    return {
        "ours": asdict(ours),
        "naive": asdict(naive),
        "max_difference": float((logps - expected).abs().max()),
        "weights_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / MB,
        "settings": {
            "rows": 16,
            "tokens": 512,
            "vocabulary": 32_000,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def print_head(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    settings = result["settings"]
    table = Table(
        title=f"Scoring {settings['rows']} x {settings['tokens']} tokens, vocabulary 32,000", title_justify="left"
    )
    table.add_column("")
    table.add_column("peak above weights", justify="right")
    table.add_column("seconds", justify="right")
    for name, label in (("ours", "trl-cdr"), ("naive", "naive: full logits, log_softmax")):
        table.add_row(label, f"{result[name]['peak_mb']:,.0f} MB", f"{result[name]['seconds']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"weights {result['weights_mb']:.0f} MB; largest difference {result['max_difference']:.1e} nats a token; "
        f"{settings['device']}, {settings['threads']} threads, torch {settings['torch']}",
        soft_wrap=True,
    )


def _llama(device: str) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
        )
        return LlamaForCausalLM(config).to(device).eval()


def _naive_logps(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
    """(B, C) float32 nats. All rows are equally long."""
    ids = torch.tensor([row.ids for row in rows], device=model.device)  # (B, T)
    with torch.inference_mode():
        logps = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # (B, T, V)
        gathered: Tensor = logps[:, rows[0].predicting].gather(2, ids[:, len(rows[0].prompt_ids) :, None])
    return gathered.squeeze(2).cpu()


def _measure(run: Callable[[], Tensor], device: str) -> tuple[Cost, Tensor]:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        sampler = _MemorySampler()
        sampler.start()
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else sampler.stop()
    return Cost(seconds, peak / MB), result


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
