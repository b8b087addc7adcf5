"""What it costs to hold a pair in less memory: each way's peak, its time to label, and to wake and fall asleep.

Random weights of one shape, a call as a step of training makes it. The peak holds the weights, unlike the other
workloads' peaks, and only what is on the device.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..config import CDRConfig
from ..scoring.causal_lm import CausalLM
from ..scoring.loading import load_model
from ..scoring.memory import measured_bytes
from ..scoring.offload import Bed, OnDisk, OnHost, Turns
from ..scoring.packing import Layout
from ..scoring.policy_base import PolicyBase
from ..scoring.sources import find_source
from .adapter_pair import add_adapter, save_adapter
from .measure import MB, describe_machine, measure
from .run import TOKEN_BUDGET
from .workloads import Shape, build_model

_ROLES = ("strong", "weak")
_SHAPES = {
    "cpu": Shape(0, 2, prompts=2),
    "cuda": Shape(0, 8, prompts=8, prompt=256, shortest=128, longest=256),
}


class _Timed:
    """A bed that notes the seconds of each waking and each falling asleep."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self.woke: list[float] = []
        self.slept: list[float] = []

    def wake(self) -> None:
        self._note(self._bed.wake, self.woke)

    def sleep(self) -> None:
        self._note(self._bed.sleep, self.slept)

    def _note(self, move: Callable[[], None], seconds: list[float]) -> None:
        started = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - started)


def run_memory(model: str, *, dtype: str, attention: str, runs: int = 5) -> dict[str, Any]:
    """
    Measure a pair of two models that stays, sleeps on the host, or on disk; one of a base and an adapter; and one on a
    policy's base.

    Args:
        model (`str`): One of `MODELS`, built twice with random weights; some is saved, in a folder of the system's for
            temporary files.
        dtype (`str`): `"auto"` is float32 on the CPU and bfloat16 on a GPU.
        attention (`str`): Attention implementation.
        runs (`int`, *optional*, defaults to 5): Calls after the first; seconds are their medians.

    Returns:
        `dict`: `workload`, `machine`, `dtype`, `rows`, `pair_mb` (both models' weights), and `cases`: for each `label`,
        `between_mb` (on the device between calls), `peak_mb` (within the first; a CPU's allocator knows nothing of
        files that are mapped, so that on disk it is too small there), `host_mb`, `ways` (how each model runs, and why
        it is not packed), `seconds` (of a call) and of these `wake_seconds` and `sleep_seconds` (both models'). The
        memory of a policy is not counted.

    Raises:
        ConfigError: peft is not installed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    shape = _SHAPES[device]
    build = partial(build_model, model, device=device, dtype=getattr(torch, dtype), attention=attention)
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "init_kwargs": {"attn_implementation": attention}}
    weigh = partial(_measure, shape=shape, device=device, runs=runs)
    with tempfile.TemporaryDirectory() as scratch:
        cases = [*_two_models(build, Path(scratch), loading, weigh), *_one_base(build, Path(scratch), loading, weigh)]
    return {
        "workload": "memory",
        "machine": describe_machine(device),
        "dtype": dtype,
        "rows": shape.label,
        "pair_mb": cases[0]["between_mb"],
        "cases": cases,
    }


def print_memory_costs(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    table = Table(title=f"memory: {result['rows']}; {result['dtype']}", title_justify="left")
    headings = ("between calls MB", "peak MB", "host MB", "a call s", "waking s", "falling asleep s")
    table.add_column("the pair", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for case in result["cases"]:
        sizes = (f"{case[name]:,.0f}" for name in ("between_mb", "peak_mb", "host_mb"))
        seconds = (f"{case[name]:.3g}" for name in ("seconds", "wake_seconds", "sleep_seconds"))
        table.add_row(case["label"], *sizes, *seconds)
    machine = result["machine"]
    console = Console(width=max(120, Console().width))
    console.print(table)
    console.print(
        f"MB of the device, weights included. {machine['device']}, {machine['threads']} threads; torch "
        f"{machine['torch']}, transformers {machine['transformers']}. {'; '.join(result['cases'][0]['ways'])}.",
        soft_wrap=True,
        markup=False,
    )


def _two_models(
    build: Callable[..., nn.Module], scratch: Path, loading: Mapping[str, Any], weigh: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Strong and weak, each with weights of its own, by where they sleep."""
    folders = [scratch / role for role in _ROLES]
    cases: list[dict[str, Any]] = []
    for label, place in (("two copies", "none"), ("asleep on the host", "cpu"), ("asleep on disk", "disk")):
        turns = Turns()
        lms: list[CausalLM] = []
        beds: list[_Timed] = []
        for seed, (role, folder) in enumerate(zip(_ROLES, folders, strict=True)):
            turns.sleep()
            lms.append(CausalLM(build(seed=seed), role))
            if place != "none":
                beds.append(_put_to_bed(lms[-1], role, place, folder, turns, loading))
        cases.append({"label": label, **weigh(lms, beds, turns)})
        cases[-1]["host_mb"] = cases[0]["between_mb"] if place == "cpu" else 0.0
        del lms, beds, turns
        gc.collect()
    return cases


def _one_base(
    build: Callable[..., Any], scratch: Path, loading: Mapping[str, Any], weigh: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Strong an adapter on weak's own weights, which are the pair's, or those of a policy that trains another."""
    folder, adapter = scratch / "base", scratch / "adapter"
    build(seed=0).save_pretrained(folder)
    save_adapter(str(folder), adapter, **loading)
    source = find_source(CDRConfig(str(folder), str(folder), cdr_strong_adapter=str(adapter)), "strong")
    cases: list[dict[str, Any]] = []
    for label, is_policys in (("one base, an adapter", False), ("on the policy's base", True)):
        policy = add_adapter(load_model(str(folder), "weak", **loading)) if is_policys else None
        base = PolicyBase(policy).model if policy is not None else None
        strong = CausalLM.load(source.name, "strong", adapter=source.adapter, base=base, **loading)
        weak = CausalLM.load(source.name, "weak", base=strong.base, **loading)
        found = weigh([strong, weak], (), Turns())
        held = measured_bytes(base) / MB if base is not None else 0.0
        found |= {name: found[name] - held for name in ("between_mb", "peak_mb")}
        cases.append({"label": label, **found, "host_mb": 0.0})
        del strong, weak, policy, base
        gc.collect()
    return cases


def _put_to_bed(lm: CausalLM, role: str, place: str, folder: Path, turns: Turns, loading: Mapping[str, Any]) -> _Timed:
    """Where a model sleeps from now on; as `pair_loading` does it."""
    if place == "disk":
        lm.model.save_pretrained(folder)
        bed = _Timed(OnDisk(lm.model, partial(load_model, str(folder), role, **loading)))
    else:
        bed = _Timed(OnHost(lm.model, role))
    turns.add(bed, partial(lm.rest, keep=place == "cpu"))
    lm.wake = partial(turns.wake, bed)
    return bed


def _measure(
    lms: Sequence[CausalLM], beds: Sequence[_Timed], turns: Turns, *, shape: Shape, device: str, runs: int
) -> dict[str, Any]:
    layout = Layout(shape.rows(min(lm.num_embeddings for lm in lms)))

    def call() -> None:
        with turns.call():
            for lm in lms:
                lm.per_token_logps(layout, token_budget=TOKEN_BUDGET)

    call()  # the check at load, and the copy on the host
    between = measured_bytes(*(lm.model for lm in lms)) / MB
    for bed in beds:
        bed.woke.clear()
        bed.slept.clear()
    cost = measure({"call": call}, device=device, runs=runs)["call"]
    return {
        "between_mb": between,
        "peak_mb": between + cost.peak_mb,
        "ways": [lm.explain_way() for lm in lms],
        "seconds": cost.warm,
        "wake_seconds": float(sum(median(bed.woke) for bed in beds)),
        "sleep_seconds": float(sum(median(bed.slept) for bed in beds)),
    }
