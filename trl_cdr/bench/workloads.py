"""The benchmarks' rows and models, all random and seeded. Measures nothing; `run` does."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..scoring.types import Row


@dataclass(frozen=True)
class Shape:
    """The rows of one call: prompts behind a common prefix, each with some completions. Lengths in tokens."""

    prefix: int
    num_generations: int
    prompts: int = 4
    prompt: int = 64
    shortest: int = 64
    longest: int = 192

    @property
    def label(self) -> str:
        """How a table names it."""
        before = f"prefix {self.prefix}" if self.prefix or self.prompt == 64 else f"prompts of {self.prompt:,}"
        return f"{self.prompts} x {self.num_generations}, {before}"

    def rows(self, vocab_size: int) -> list[Row]:
        """Random rows of this shape; the same in every run."""
        rng = random.Random(0)

        def draw(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(vocab_size) for _ in range(count))

        prefix = draw(self.prefix)
        prompts = [prefix + draw(self.prompt) for _ in range(self.prompts)]
        count = self.prompts * self.num_generations
        lengths = [self.shortest + (self.longest - self.shortest) * i // max(1, count - 1) for i in range(count)]
        rng.shuffle(lengths)  # evenly spread, in no order
        return [Row(prompts[i // self.num_generations], draw(length)) for i, length in enumerate(lengths)]


_TABLE = [Shape(0, 2), Shape(512, 2), Shape(512, 8), Shape(1024, 8)]
_BIG = Shape(0, 2, prompts=16, prompt=256, shortest=256, longest=256)

WORKLOADS: dict[str, tuple[str, list[Shape]]] = {
    # name: (what for, shapes)
    "table": ("shared prompts and prefixes", _TABLE),
    "single": (
        "rows that share little or nothing",
        [Shape(0, 1, prompts=1), Shape(0, 1, prompts=8), Shape(0, 4, prompts=1), Shape(512, 1)],
    ),
    "linear": ("1, 2, 4 and 8 times the same call", [Shape(512, 4, prompts=count) for count in (1, 2, 4, 8)]),
    "long": (
        "long prompts, each with some completions",
        [
            *(Shape(0, 4, prompts=1, prompt=prompt, shortest=200, longest=200) for prompt in (500, 2000)),
            Shape(0, 4, prompts=2, prompt=3000, shortest=200, longest=200),
        ],
    ),
    "head": ("long rows of a large vocabulary", [Shape(0, 1, prompts=16, prompt=64, shortest=448, longest=448)]),
    "large": (
        "batches for a GPU",
        [replace(_BIG, prefix=prefix, num_generations=count) for prefix in (0, 1024) for count in (2, 8)],
    ),
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-58m": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    },
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
}


def build_model(name: str, *, seed: int, device: str, dtype: torch.dtype, attention: str) -> LlamaForCausalLM:
    """A random model of `MODELS`, made on the device."""
    config = LlamaConfig(**MODELS[name], attn_implementation=attention)
    devices = [0] if device == "cuda" else []
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)
