"""The `trl-cdr` command. Parses; `demo`, `training`, `annotation` and `bench` do the work, imported when their command
runs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import CDRError, ConfigError

_COMMANDS = {
    "demo": "build a tiny strong/weak pair and train a policy on its labels, offline, in about two minutes",
    "train": "train a policy on the pair's labels: GRPO, RLOO, online DPO, SimPO; from YAML or arguments",
    "score": "score a JSONL file of prompts and completions",
    "bench": "measure what scoring costs, beside the naive way",
    "doctor": "print versions, and how each model of a pair will run: what a bug report should hold",
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command line (default: the process's own).

    Raises:
        SystemExit: with status 2 where arguments or input are wrong; the message on stderr says what to change.
    """
    parser = argparse.ArgumentParser(
        prog="trl-cdr",
        description="Preference labels from the log-density ratio of two open models.",
        epilog="trl-cdr COMMAND --help lists a command's arguments.",
    )
    parser.add_argument("--version", action="version", version=f"trl-cdr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command, rest = parser.parse_known_args(argv)
    try:
        run = {"demo": _demo, "train": _train, "score": _score, "bench": _bench, "doctor": _doctor}[command.command]
        run(rest)
    except CDRError as error:
        print(f"trl-cdr {command.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _demo(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trl-cdr demo", description=_describe("demo"))
    parser.add_argument("--output_dir", default="./trl-cdr-demo", help="folder for the figures and JSON")
    parser.add_argument("--no_cache", action="store_true", help="build the tiny models anew")
    parser.add_argument("--customize", action="store_true", help="show what criteria and exemplars do, in its place")
    args = parser.parse_args(argv)

    if args.customize:
        from .demo.customize import run_customize as run
    else:
        from .demo.story import run_demo as run

    run(args.output_dir, cache=not args.no_cache)


def _train(argv: list[str]) -> None:
    from trl import ModelConfig, ScriptArguments

    from .config import CDRConfig
    from .training.train import TrainArguments, train

    # --trainer, on the command line or in YAML, says which config reads the rest.
    [first], _ = _read("train", (TrainArguments,), argv, add_help=False)
    kinds = (TrainArguments, ScriptArguments, first.config_class, ModelConfig, CDRConfig)
    arguments, script_args, training_args, model_args, cdr_args = _parse("train", kinds, argv)
    train(arguments, script_args=script_args, training_args=training_args, model_args=model_args, cdr_args=cdr_args)


def _score(argv: list[str]) -> None:
    from .annotation.score_file import ScoreArguments, score_file
    from .config import CDRConfig

    arguments, config = _parse("score", (ScoreArguments, CDRConfig), argv)
    score_file(arguments, config)


def _bench(argv: list[str]) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: its profiler reports its starts on stderr
    from .bench.workloads import MODELS, WORKLOADS

    parser = argparse.ArgumentParser(prog="trl-cdr bench", description=_describe("bench"))
    about = "; ".join(f"{name}: {what}" for name, (what, _) in WORKLOADS.items())
    about += "; pair_step: forward and backward of SimPO and DPO, beside TRL's own trainers"
    about += "; gaming: policies trained on the plain and on the gated reward (an hour)"
    choices = [*WORKLOADS, "pair_step", "gaming"]
    parser.add_argument("--workload", choices=choices, default="table", help=f"which rows ({about}); default: table")
    parser.add_argument("--model", choices=MODELS, default="llama-58m", help="architecture of a pair of random weights")
    parser.add_argument("--cdr_strong", help="measure this model (name or path) in place of random weights")
    parser.add_argument("--cdr_weak", help="the weak model beside it")
    parser.add_argument("--cdr_dtype", default="auto", help="float32, bfloat16, float16; auto: float32 on CPU")
    parser.add_argument("--attention", default="sdpa", help="attention implementation, such as eager; default: sdpa")
    parser.add_argument(
        "--runs", type=int, default=5, help="runs after the first, whose medians are printed; default: 5"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    args = parser.parse_args(argv)
    if (args.cdr_strong is None) != (args.cdr_weak is None):
        parser.error("--cdr_strong and --cdr_weak go together")
    if args.runs < 1:
        parser.error(f"--runs is {args.runs}: use 1 or more")

    if args.workload == "gaming":
        from .demo.gaming import print_gaming, run_gaming

        gaming = run_gaming()
        print(json.dumps(gaming, indent=2)) if args.json else print_gaming(gaming)
        return

    if args.workload == "pair_step":
        from .bench.pair_step import print_pair_step, run_pair_step

        steps = run_pair_step(
            args.model, args.cdr_strong, dtype=args.cdr_dtype, attention=args.attention, runs=args.runs
        )
        print(json.dumps(steps, indent=2)) if args.json else print_pair_step(steps)
        return

    from .bench.run import load_pair, print_workload, run_workload

    names = None if args.cdr_strong is None else (args.cdr_strong, args.cdr_weak)
    pair = load_pair(args.model, names, dtype=args.cdr_dtype, attention=args.attention)
    result = run_workload(args.workload, pair, runs=args.runs)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_workload(result)


def _doctor(argv: list[str]) -> None:
    from .config import CDRConfig
    from .doctor import examine, print_examination

    parsed = _parse("doctor", (CDRConfig,), argv) if argv else (None,)
    print_examination(examine(parsed[0]))


def _parse(command: str, kinds: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """Dataclasses from the command line and `--config`; unlike TRL's own scripts, what is unknown is an error."""
    parsed, unknown = _read(command, kinds, argv)
    if unknown:
        raise ConfigError(
            f"unknown arguments: {' '.join(unknown)}. trl-cdr {command} --help lists those that are known."
        )
    return parsed


def _read(
    command: str, kinds: tuple[type, ...], argv: list[str], *, add_help: bool = True
) -> tuple[tuple[Any, ...], list[str]]:
    """Dataclasses, and the words that no field of theirs claims."""
    import yaml
    from trl import TrlParser

    parser = TrlParser(
        kinds, prog=f"trl-cdr {command}", description=_describe(command), add_help=add_help, allow_abbrev=False
    )
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except CDRError:
        raise
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {error}") from error
    except ValueError as error:  # how TRL's and transformers' configs refuse a value
        raise ConfigError(str(error)) from error
    return tuple(parsed), unknown


def _describe(command: str) -> str:
    summary = _COMMANDS[command]
    return f"{summary[0].upper()}{summary[1:]}."
