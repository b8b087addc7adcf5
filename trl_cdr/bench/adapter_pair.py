"""What a pair of one base and an adapter costs, beside the same pair as two merged models.

The adapter is random; `run` has the rows and the table of what scoring costs at all.
"""

import importlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..config import CDRConfig
from ..errors import ConfigError
from ..scoring.causal_lm import CausalLM
from ..scoring.loading import load_model
from ..scoring.memory import measured_bytes
from ..scoring.packing import Layout
from ..scoring.sources import find_source
from .measure import MB, describe_machine, measure
from .run import TOKEN_BUDGET
from .workloads import WORKLOADS, Shape, build_model

RANK = 16


def run_adapter_pair(model: str, name: str | None, *, dtype: str, attention: str, runs: int = 5) -> dict[str, Any]:
    """
    Measure strong as a base with a LoRA adapter on all its linear layers and weak as the base, beside two models.

    Args:
        model (`str`): One of `MODELS`, built with random weights, if there is no name.
        name (`str` or `None`): The base (name or path) in its place.
        dtype (`str`): `"auto"` is float32 on the CPU and bfloat16 on a GPU.
        attention (`str`): Attention implementation.
        runs (`int`, *optional*, defaults to 5): Runs after the first; medians are of these.

    Returns:
        `dict`: `machine`, `dtype`, `rank`, `weights_mb.*` (`adapter`, `merged`: bytes of distinct storages, 2**20),
        `weights_share`, and `cases`: for each shape `label`, `seconds.*`, `peak_mb.*` (both `adapter`, `merged`),
        `over_merged` (the median of the runs' ratios), `max_difference` (of a token, nats) and `row_difference` (of a
        row's sum, nats a token).

    Raises:
        ConfigError: peft is not installed.
        ModelError: the name can't be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as scratch:
        if name is None:
            name = str(Path(scratch) / "base")
            torch_dtype = getattr(torch, dtype)
            build_model(model, seed=0, device=device, dtype=torch_dtype, attention=attention).save_pretrained(name)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "init_kwargs": {"attn_implementation": attention}}
        merged = save_adapter(name, Path(scratch) / "adapter", **options)
        source = find_source(CDRConfig(name, name, cdr_strong_adapter=str(Path(scratch) / "adapter")), "strong")
        strong = CausalLM.load(name, "strong", adapter=source.adapter, prefix_cache_tokens=TOKEN_BUDGET, **options)
        weak = CausalLM.load(name, "weak", base=strong.base, prefix_cache_tokens=TOKEN_BUDGET, **options)
        other = CausalLM.load(name, "weak", prefix_cache_tokens=TOKEN_BUDGET, **options)
    pairs = {
        "adapter": [strong, weak],
        "merged": [CausalLM(merged, "strong", prefix_cache_tokens=TOKEN_BUDGET), other],
    }
    held = {way: measured_bytes(*(lm.model for lm in pair)) / MB for way, pair in pairs.items()}
    return {
        "workload": "adapter_pair",
        "machine": describe_machine(device),
        "dtype": dtype,
        "rank": RANK,
        "weights_mb": held,
        "weights_share": held["adapter"] / held["merged"],
        "ways": [f"{name} {lm.explain_way()}" for name, pair in pairs.items() for lm in pair],
        "cases": [_run_shape(shape, pairs, device=device, runs=runs) for shape in WORKLOADS["table"][1]],
    }


def print_adapter_pair(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    machine, held = result["machine"], result["weights_mb"]
    title = f"adapter_pair: a base and a LoRA adapter of rank {result['rank']} beside two merged models"
    table = Table(title=f"{title}; {result['dtype']}", title_justify="left")
    for heading in (
        "prompts x completions",
        "adapter s",
        "merged s",
        "over merged",
        "adapter MB",
        "merged MB",
        "differ",
    ):
        table.add_column(heading, justify="left" if heading.startswith("prompts") else "right", no_wrap=True)
    for case in result["cases"]:
        table.add_row(
            case["label"],
            *(f"{case['seconds'][way]:.3g}" for way in ("adapter", "merged")),
            f"{case['over_merged']:.2f}x",
            *(f"{case['peak_mb'][way]:,.0f}" for way in ("adapter", "merged")),
            f"{case['row_difference']:.1g}",
        )
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(
        f"Weights {held['adapter']:,.0f} MB, merged {held['merged']:,.0f} MB: {result['weights_share']:.3f} of it. MB: "
        f"peak allocated above them; differ: a row, nats a token, at most. {machine['device']}, "
        f"{machine['threads']} threads; torch {machine['torch']}, transformers {machine['transformers']}. "
        f"{'; '.join(result['ways'])}.",
        soft_wrap=True,
        markup=False,
    )


def save_adapter(base: str, folder: Path, **options: Any) -> Any:
    """Write a random adapter; returns the model that it and its base are when merged."""
    model = load_model(base, "strong", **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = add_adapter(model)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # begins at 0; of a trained one about this size
                parameter.data.normal_(std=0.01)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload().eval()


def add_adapter(model: nn.Module) -> Any:
    """
    A model with a new adapter on all its linear layers, of the model's type: a `PeftModel`.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"peft can't be imported ({error}). Run: pip install 'trl-cdr[peft]'") from error
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft 0.21 reads what transformers 5 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _run_shape(shape: Shape, pairs: dict[str, list[CausalLM]], *, device: str, runs: int) -> dict[str, Any]:
    rows = shape.rows(min(lm.num_embeddings for pair in pairs.values() for lm in pair))
    found: dict[str, list[Tensor]] = {}

    def score(way: str) -> None:
        layout = Layout(rows, constant=rows[0].prompt_ids[: shape.prefix])
        found[way] = [logps for lm in pairs[way] for logps in lm.per_token_logps(layout, token_budget=TOKEN_BUDGET)]

    for pair in pairs.values():
        for lm in pair:
            lm.way()  # checked before the clock runs
    costs = measure({way: lambda way=way: score(way) for way in pairs}, device=device, runs=runs)  # type: ignore[misc]
    differences = [x.double() - y.double() for x, y in zip(found["adapter"], found["merged"], strict=True)]
    return {
        "label": shape.label,
        "seconds": {way: cost.warm for way, cost in costs.items()},
        "peak_mb": {way: cost.peak_mb for way, cost in costs.items()},
        "over_merged": costs["adapter"].over(costs["merged"]),
        "max_difference": max(float(each.abs().max()) for each in differences),
        "row_difference": max(float(each.mean().abs()) for each in differences),
    }
