"""The `trl-cdr` command. Parses; `demo`, `annotation` and `bench` do the work, imported when their command runs."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import __version__
from .errors import CDRError

_COMMANDS = {
    "demo": "build a tiny strong/weak pair and train a policy on its labels, offline, in about two minutes",
    "score": "score a JSONL file of prompts and completions",
    "bench": "measure what scoring costs, beside the naive way",
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
        {"demo": _demo, "score": _score, "bench": _bench}[command.command](rest)
    except CDRError as error:
        print(f"trl-cdr {command.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _demo(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trl-cdr demo", description=_describe("demo"))
    parser.add_argument("--output_dir", default="./trl-cdr-demo", help="folder for summary.json and gold.png")
    parser.add_argument("--no_cache", action="store_true", help="build the tiny models anew")
    args = parser.parse_args(argv)

    from .demo.story import run_demo

    run_demo(args.output_dir, cache=not args.no_cache)


def _score(argv: list[str]) -> None:
    from trl import TrlParser

    from .annotation.score_file import ScoreArguments, score_file
    from .config import CDRConfig

    parser = TrlParser((ScoreArguments, CDRConfig), prog="trl-cdr score", description=_describe("score"))
    try:
        arguments, config, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except OSError as error:
        parser.error(f"--config: {error}")
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    score_file(arguments, config)


def _bench(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trl-cdr bench", description=_describe("bench"))
    parser.add_argument("--workload", choices=["head"], default="head", help="head: peak memory of a large vocabulary")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    args = parser.parse_args(argv)

    import torch

    from .bench import bench_head, print_head

    result = bench_head("cuda" if torch.cuda.is_available() else "cpu")
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_head(result)


def _describe(command: str) -> str:
    summary = _COMMANDS[command]
    return f"{summary[0].upper()}{summary[1:]}."
