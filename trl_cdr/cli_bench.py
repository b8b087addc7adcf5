"""`trl-cdr bench`: which workload, of what, and how its result is shown. `bench` and `demo` measure."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from .arguments import DATA_HELP, check_output

Shown = tuple[Any, Callable[[Any], None]]
"""A result, and what prints it."""


def bench(argv: list[str], *, description: str) -> None:
    """
    Run a workload and print what it measured.

    Args:
        argv (`list[str]`): The command line behind `bench`.
        description (`str`): For `--help`.

    Raises:
        SystemExit: the arguments are wrong.
        CDRError: see the workload.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: its profiler reports its starts on stderr
    args = _read(argv, description)
    run = _WORKLOADS[args.workload][2] if args.workload in _WORKLOADS else _rows
    result, show = run(args)
    print(json.dumps(result, indent=2)) if args.json else show(result)


def _rows(args: argparse.Namespace) -> Shown:
    """What scoring costs, on one of `bench.workloads`."""
    from .bench.run import load_pair, print_workload, run_workload

    names = None if args.cdr_strong is None else (args.cdr_strong, args.cdr_weak)
    pair = load_pair(args.model, names, dtype=args.cdr_dtype, attention=args.attention)
    return run_workload(args.workload, pair, runs=args.runs), print_workload


def _pair_step(args: argparse.Namespace) -> Shown:
    from .bench.pair_step import print_pair_step, run_pair_step

    options = {"dtype": args.cdr_dtype, "attention": args.attention, "runs": args.runs}
    return run_pair_step(args.model, args.cdr_strong, **options), print_pair_step


def _memory(args: argparse.Namespace) -> Shown:
    from .bench.memory import print_memory_costs, run_memory

    costs = run_memory(args.model, dtype=args.cdr_dtype, attention=args.attention, runs=args.runs)
    return costs, print_memory_costs


def _adapter_pair(args: argparse.Namespace) -> Shown:
    from .bench.adapter_pair import print_adapter_pair, run_adapter_pair

    options = {"dtype": args.cdr_dtype, "attention": args.attention, "runs": args.runs}
    return run_adapter_pair(args.model, args.cdr_strong, **options), print_adapter_pair


def _annotate(_: argparse.Namespace) -> Shown:
    from .bench.annotate import print_annotate, run_annotate

    return run_annotate(), print_annotate


def _gaming(_: argparse.Namespace) -> Shown:
    from .demo.gaming import print_gaming, run_gaming

    return run_gaming(), print_gaming


def _alarms(args: argparse.Namespace) -> Shown:
    from .demo.alarms import print_alarms, run_alarms

    check_output(args.output_dir)
    return run_alarms(args.output_dir), print_alarms


def _optimum(_: argparse.Namespace) -> Shown:
    from .demo.optimum import print_optimum, run_optimum

    return run_optimum(), print_optimum


def _real(args: argparse.Namespace) -> Shown:
    from .demo.real import run_real

    check_output(args.output_dir)
    return run_real(args.output_dir, model=args.model, data=args.data), lambda _: None  # it says where its results are


_RANDOM = ("model", "cdr_dtype", "attention", "runs", "json")
_READS = (*_RANDOM, "cdr_strong", "cdr_weak")
"""Arguments of those of `bench.workloads`."""
# Beside them: what they measure, which arguments they read, and how.
_WORKLOADS: dict[str, tuple[str, tuple[str, ...], Callable[[argparse.Namespace], Shown]]] = {
    "pair_step": (
        "forward and backward of SimPO and DPO, beside TRL's own trainers",
        (*_RANDOM, "cdr_strong"),
        _pair_step,
    ),
    "adapter_pair": (
        "a base and an adapter on it, beside the same pair as two models",
        (*_RANDOM, "cdr_strong"),
        _adapter_pair,
    ),
    "memory": (
        "a pair that stays, or sleeps between calls: peaks, and seconds to wake (with llama-8b on a GPU)",
        _RANDOM,
        _memory,
    ),
    "annotate": (
        "rows a second and memory without models, and what runs end with that are killed",
        ("json",),
        _annotate,
    ),
    "gaming": ("policies trained on the plain and on gated rewards (hours)", ("json",), _gaming),
    "alarms": (
        "runs by which the monitor is judged, healthy and collapsing (hours; goes on where it was)",
        ("output_dir",),
        _alarms,
    ),
    "optimum": ("what a policy converges to, by weighted samples and by training (20 minutes)", ("json",), _optimum),
    "real": (
        "a real model's pair, its labels, gates, and policies trained on it (hours; goes on where it was)",
        ("model", "data", "output_dir"),
        _real,
    ),
}
_DEFAULTS = {"cdr_dtype": "auto", "attention": "sdpa", "runs": 5, "json": False}


def _read(argv: list[str], description: str) -> argparse.Namespace:
    from .bench.workloads import MODELS, WORKLOADS

    about = {name: what for name, (what, *_) in [*WORKLOADS.items(), *_WORKLOADS.items()]}
    named = "; ".join(f"{name}: {what}" for name, what in about.items())
    parser = argparse.ArgumentParser(
        prog="trl-cdr bench", description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--workload", choices=[*about], default="table", help=f"which rows ({named}); default: table")
    parser.add_argument(
        "--model",
        help=f"architecture of a pair of random weights: {', '.join(MODELS)}; default: llama-58m. With --workload real "
        "an instruct model, name or path, in place of SmolLM2-135M",
    )
    parser.add_argument("--data", help=f"with --workload real: {DATA_HELP}")
    parser.add_argument(
        "--output_dir", help="of --workload real and alarms: folder for results; default: ./trl-cdr-bench-WORKLOAD"
    )
    parser.add_argument(
        "--cdr_strong",
        help="measure this model (name or path) in place of random weights; pair_step and adapter_pair need no other",
    )
    parser.add_argument("--cdr_weak", help="the weak model beside it")
    parser.add_argument("--cdr_dtype", help="float32, bfloat16, float16; auto: float32 on CPU")
    parser.add_argument("--attention", help="attention implementation, such as eager; default: sdpa")
    parser.add_argument("--runs", type=int, help="runs after the first, whose medians are printed; default: 5")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    given = vars(parser.parse_args(argv))
    workload = given["workload"]
    reads = _WORKLOADS[workload][1] if workload in _WORKLOADS else _READS
    for name in given:
        if name not in ("workload", *reads):
            parser.error(f"--{name} is not read by --workload {workload}, which reads --{', --'.join(reads)}")
    folder = {"output_dir": f"./trl-cdr-bench-{workload}"}
    args = argparse.Namespace(**{**dict.fromkeys((*_READS, "data")), **_DEFAULTS, **folder, **given})
    if "cdr_weak" in reads and (args.cdr_strong is None) != (args.cdr_weak is None):
        parser.error("--cdr_strong and --cdr_weak go together")
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}: use 1 or more")
    if workload != "real":
        args.model = args.model or "llama-58m"
        if args.model not in MODELS:
            parser.error(f"--model is {args.model!r}: use one of {', '.join(MODELS)}")
    return args
