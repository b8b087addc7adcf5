"""Compare the speed of scoring in two environments, such as two versions of transformers.

    python examples/benchmarks/two_environments.py PYTHON OTHER_PYTHON [--rounds 5]

Each argument is the Python of an environment with trl-cdr (`nox` makes them: .nox/compat-newest/bin/python). Both
score the rows of `trl-cdr bench` in turn, in processes of their own, so that a machine that changes its pace does so
for both. Prints medians of the seconds and of the ratios. A round takes about three minutes on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

KINDS = ("warm", "cold")


def measure_here(runs: int) -> None:
    """Score each shape `runs` times after the first time, and print the seconds as JSON."""
    from trl_cdr.bench.measure import describe_machine, measure
    from trl_cdr.bench.run import TOKEN_BUDGET, load_pair
    from trl_cdr.bench.workloads import WORKLOADS
    from trl_cdr.scoring.packing import Layout

    pair = load_pair("llama-58m", None, dtype="float32", attention="sdpa")
    device = pair[0].decoder.device.type
    ways = [lm.explain_way() for lm in pair]  # the check at load is over before the clock runs
    cases = []
    for shape in WORKLOADS["table"][1]:
        rows = shape.rows(min(lm.num_embeddings for lm in pair))

        def score(rows=rows, prefix=shape.prefix) -> None:
            for lm in pair:
                lm.per_token_logps(Layout(rows, constant=rows[0].prompt_ids[:prefix]), token_budget=TOKEN_BUDGET)

        cost = measure({"ours": score}, device=device, runs=runs)["ours"]
        cases.append({"label": shape.label, "warm": cost.warm, "cold": cost.cold})
    print(json.dumps({"machine": describe_machine(device), "ways": ways, "cases": cases}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="two of them; none: measure this one")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each environment")
    parser.add_argument("--runs", type=int, default=5, help="warm calls in a process")
    args = parser.parse_args()
    if not args.pythons:
        measure_here(args.runs)
        return
    if len(args.pythons) != 2:
        parser.error(f"{len(args.pythons)} environments are given. Give the Python of two.")
    command = [sys.argv[0], "--runs", str(args.runs)]
    results: list[list[dict]] = []
    for _ in range(args.rounds):
        runs = [subprocess.run([python, *command], check=True, stdout=subprocess.PIPE) for python in args.pythons]
        results.append([json.loads(run.stdout.splitlines()[-1]) for run in runs])
    names = [f"transformers {result['machine']['transformers']}" for result in results[0]]
    table = Table(title=f"{names[0]} over {names[1]}, in turn, {args.rounds} rounds", title_justify="left")
    for heading in ("prompts x completions", *("s", "other s", "ratio", "cold s", "other s", "ratio")):
        table.add_column(heading, justify="left" if heading.startswith("prompts") else "right", no_wrap=True)
    for number, case in enumerate(results[0][0]["cases"]):
        cells = []
        for kind in KINDS:
            seconds = [[result["cases"][number][kind] for result in pair] for pair in results]
            cells += [f"{statistics.median(column):.3f}" for column in zip(*seconds, strict=True)]
            cells.append(f"{statistics.median(first / second for first, second in seconds):.2f}")
        table.add_row(case["label"], *cells)
    machine = results[0][0]["machine"]
    Console(width=80).print(table)
    print("cold: the first call, which also runs the prefix, under a profiler of memory.")
    print(f"{machine['device']}, {machine['threads']} threads, Python {machine['python']}, torch {machine['torch']}.")
    for name, result in zip(names, results[0], strict=True):
        print(f"{name}: {'; '.join(result['ways'])}.")


if __name__ == "__main__":
    main()
