"""Compare the speed of two environments on `trl-cdr bench`, such as two versions of transformers.

    python examples/benchmarks/two_environments.py PYTHON OTHER_PYTHON [--rounds 3]

Each argument is the Python of an environment with trl-cdr (`nox` makes them: .nox/compat-newest/bin/python). The
benches run in turn, so that a machine that changes its pace does so for both. Prints medians of seconds and ratios.
Takes about two minutes for each bench on two cores.
"""

import argparse
import json
import statistics
import subprocess

from rich.console import Console
from rich.table import Table


def bench(python: str) -> dict:
    command = [python, "-m", "trl_cdr", "bench", "--workload", "table", "--runs", "3", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs=2, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: list[list[dict]] = [[bench(python) for python in args.pythons] for _ in range(args.rounds)]
    names = [f"transformers {result['machine']['transformers']}" for result in results[0]]
    table = Table(title=f"{names[0]} and {names[1]}, in turn, {args.rounds} times", title_justify="left")
    for heading in ("prompts x completions", "seconds", "other", "ratio", "cold", "other", "ratio"):
        table.add_column(heading, justify="left" if heading.startswith("prompts") else "right", no_wrap=True)
    for number, case in enumerate(results[0][0]["cases"]):
        cells = []
        for kind in ("ours", "cold"):
            seconds = [[result["cases"][number]["seconds"][kind] for result in pair] for pair in results]
            cells += [f"{statistics.median(column):.3f}" for column in zip(*seconds, strict=True)]
            cells.append(f"{statistics.median(first / second for first, second in seconds):.2f}")
        table.add_row(case["label"], *cells)
    machine = results[0][0]["machine"]
    Console(width=100).print(table)
    print("seconds: a warm call; cold: the first call, which runs the prefix and is measured with its memory.")
    print(f"{machine['device']}, {machine['threads']} threads, Python {machine['python']}, torch {machine['torch']}.")
    for name, result in zip(names, results[0], strict=True):
        print(f"{name}: {'; '.join(result['ways'])}.")


if __name__ == "__main__":
    main()
