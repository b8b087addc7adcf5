"""One workload, measured five ways on one pair, and its table.

ours      packed or padded, as the rows suggest, prefix cache warm (the cold first call stands beside it)
gated     ours with the statistics of the strong model that the default gate needs
padded    every row whole, head on completion tokens only
naive     padded batches of 8 rows, full logits, float32 log_softmax
plain     unmasked forwards over ours' own tokens behind the same cached prefix, head on completion tokens
"""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config import CDRConfig
from ..scoring.causal_lm import CausalLM
from ..scoring.gate import gate_statistics
from ..scoring.logps import token_logps
from ..scoring.packed import Packed
from ..scoring.packing import Layout
from .measure import MB, Cost, describe_machine, matrix_rate, measure
from .naive import naive_logps
from .workloads import WORKLOADS, Shape, build_model

TOKEN_BUDGET = 8192


def load_pair(model: str, names: tuple[str, str] | None, *, dtype: str, attention: str) -> list[CausalLM]:
    """
    The pair to measure, on the GPU where there is one.

    Args:
        model (`str`): One of `MODELS`, built with random weights, if there are no names.
        names (`tuple[str, str]` or `None`): Strong and weak to load in its place.
        dtype (`str`): `"auto"` is float32 on the CPU and bfloat16 on a GPU.
        attention (`str`): Attention implementation.

    Raises:
        ModelError: a name can't be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if names is not None:
        return [
            CausalLM.load(
                name,
                role,
                dtype=dtype,
                device=device,
                init_kwargs={"attn_implementation": attention},
                prefix_cache_tokens=TOKEN_BUDGET,
            )
            for name, role in zip(names, ("strong", "weak"), strict=True)
        ]
    torch_dtype = getattr(torch, dtype)
    return [
        CausalLM(
            build_model(model, seed=seed, device=device, dtype=torch_dtype, attention=attention),
            role,
            prefix_cache_tokens=TOKEN_BUDGET,
        )
        for seed, role in enumerate(("strong", "weak"))
    ]


def run_workload(name: str, pair: Sequence[CausalLM], *, runs: int = 5) -> dict[str, Any]:
    """
    Measure one of `WORKLOADS`.

    Args:
        name (`str`): The workload.
        pair (`Sequence[CausalLM]`): Strong and weak, on one device.
        runs (`int`, *optional*, defaults to 5): Runs after the first; medians are of these.

    Returns:
        `dict`: `machine`, `weights_mb`, `matrix_tflops`, `ways` (how each model runs, and why it is not packed), and
        `cases`: for each shape `label`, `tokens.unique`, `tokens.run`, `tokens.padded`, `seconds.*` (`ours`, `cold`,
        `gated`, `padded`, `naive`, `plain`), `tokens_per_second`, `matrix_share` (of ours, unique tokens), `peak_mb.*`
        (as `seconds.*`, without `cold`), `speed.*` (`gated`, `naive`, `padded`, `plain`: their seconds over ours, the
        median of the runs' ratios) and `max_difference` from the naive way (nats a token).
    """
    device = pair[0].model.device.type
    ways = [lm.explain_way() for lm in pair]
    cases = [_run_shape(shape, pair, device=device, runs=runs) for shape in WORKLOADS[name][1]]
    rate = matrix_rate(device, pair[0].model.dtype)
    for case in cases:
        case["matrix_share"] = case.pop("flops_per_second") / rate
    return {
        "workload": name,
        "machine": describe_machine(device),
        "weights_mb": sum(p.numel() * p.element_size() for lm in pair for p in lm.model.parameters()) / MB,
        "matrix_tflops": rate / 1e12,
        "ways": ways,
        "cases": cases,
    }


def print_workload(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    table = Table(title=f"{result['workload']}: {WORKLOADS[result['workload']][0]}", title_justify="left")
    headings = [
        "prompts x completions",
        "unique",
        "run",
        "padded",
        "ours s",
        "cold s",
        "gated",
        "naive",
        "padded",
        "plain",
        "tokens/s",
    ]
    for index, heading in enumerate([*headings, "matrix", "ours MB", "naive MB"]):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for case in result["cases"]:
        seconds, speed = case["seconds"], case["speed"]
        table.add_row(
            case["label"],
            *(f"{case['tokens'][kind]:,}" for kind in ("unique", "run", "padded")),
            f"{seconds['ours']:.3g}",
            f"{seconds['cold']:.3g}",
            *(f"{speed[way]:.2f}x" for way in ("gated", "naive", "padded", "plain")),
            f"{case['tokens_per_second']:,.0f}",
            f"{case['matrix_share']:.0%}",
            *(f"{case['peak_mb'][way]:,.0f}" for way in ("ours", "naive")),
        )
    machine = result["machine"]
    console = Console(width=max(140, Console().width))
    console.print(table)
    console.print(
        "gated, naive, padded, plain: their seconds over ours. MB: peak allocated above the weights. "
        f"{machine['device']}, {machine['threads']} threads, {result['matrix_tflops']:.3g} Tflop/s; "
        f"torch {machine['torch']}, transformers {machine['transformers']}. {'; '.join(result['ways'])}.",
        soft_wrap=True,
        markup=False,
    )


def _run_shape(shape: Shape, pair: Sequence[CausalLM], *, device: str, runs: int) -> dict[str, Any]:
    rows = shape.rows(min(lm.num_embeddings for lm in pair))
    # What stands before all rows is a conditioning's: it serves other calls too.
    constant = rows[0].prompt_ids[: shape.prefix]
    layout = Layout(rows, constant=constant)
    packed = [Packed(lm.decoder, prefix_cache_tokens=TOKEN_BUDGET) for lm in pair]
    statistics = gate_statistics(CDRConfig.cdr_gate, sorted(pair[0].end_ids) or [0])  # random weights name no end
    kept: dict[int, list[Tensor]] = {}
    expected: dict[int, list[Tensor]] = {}

    def ours() -> None:
        fresh = Layout(rows, constant=constant)  # planning is part of the cost
        for place, lm in enumerate(pair):
            kept[place] = lm.per_token_logps(fresh, token_budget=TOKEN_BUDGET)

    def gated() -> None:
        fresh = Layout(rows, constant=constant)
        for lm, reduce in zip(pair, (statistics, token_logps), strict=True):
            lm.per_token_logps(fresh, token_budget=TOKEN_BUDGET, reduce=reduce)

    def plain() -> None:
        for lm, way in zip(pair, packed, strict=True):
            _plain(lm, way, layout)

    def padded() -> None:
        for lm in pair:
            lm.per_token_logps(Layout(rows), token_budget=TOKEN_BUDGET, padded=True)

    def naive() -> None:
        for place, lm in enumerate(pair):
            expected[place] = naive_logps(lm.model, rows, batch_size=8, dtype=torch.float32)

    ways = {"ours": ours, "gated": gated, "padded": padded, "plain": plain, "naive": naive}
    costs = measure(ways, device=device, runs=runs)
    difference = max(
        float((x - y).abs().max())
        for place in range(len(pair))
        for x, y in zip(kept[place], expected[place], strict=True)
    )
    return _summarise(shape, pair, layout, costs, difference=difference)


def _summarise(
    shape: Shape, pair: Sequence[CausalLM], layout: Layout, costs: dict[str, Cost], *, difference: float
) -> dict[str, Any]:
    unique = layout.num_unique - len(layout.constant)  # which was run before
    completion = sum(len(row.completion_ids) for row in layout.rows)
    flops = sum(_flops(lm, unique, completion) for lm in pair)
    ours = costs["ours"].warm
    return {
        "label": shape.label,
        "tokens": {
            "unique": unique,
            "run": pair[0].count_tokens(layout, token_budget=TOKEN_BUDGET),
            "padded": len(layout.rows) * max(len(row.ids) for row in layout.rows),
        },
        "seconds": {way: cost.warm for way, cost in costs.items()} | {"cold": costs["ours"].cold},
        "tokens_per_second": len(pair) * unique / ours,
        "flops_per_second": flops / ours,
        "peak_mb": {way: cost.peak_mb for way, cost in costs.items()},
        "speed": {way: cost.over(costs["ours"]) for way, cost in costs.items() if way != "ours"},
        "max_difference": difference,
    }


def _flops(lm: CausalLM, tokens: int, completion: int) -> int:
    """Of the matrix products with weights: two a weight and token, the head's for completion tokens only."""
    head, embedding = lm.model.get_output_embeddings().weight, lm.model.get_input_embeddings().weight
    apart: int = sum(weight.numel() for weight in {id(weight): weight for weight in (head, embedding)}.values())
    body: int = sum(p.numel() for p in lm.model.parameters()) - apart
    return 2 * (body * tokens + int(head.numel()) * completion)


def _plain(lm: CausalLM, packed: Packed, layout: Layout) -> None:
    """The packs' tokens as plain causal text: what they would cost if they needed no mask and no planning."""
    decoder = lm.decoder
    with torch.inference_mode():
        for job in packed.plan(layout, TOKEN_BUDGET):
            assert job.pack is not None
            cache = packed.fill_cache(layout, job) if layout.prefix or job.pack.stem else None
            hidden = decoder.hidden(job.pack.ids[None], cache=cache)
            decoder.logps(hidden[0, job.pack.predicting.to(decoder.device)], job.pack.targets)
        packed.forget()
