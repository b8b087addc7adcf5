"""What `annotate` does beside running models: rows a second, memory, and what a killed run ends with.

The pipeline is the real one, from JSONL to Parquet; a stub in the scorer's place makes a number of each text. Every run
is a process of its own, so that its peak of memory is its own and it can be killed with SIGKILL.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ..annotation.annotate import AnnotateArguments, make_job
from ..annotation.pipeline import run
from ..annotation.reader import open_source
from ..config import CDRConfig, shareable_options
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer

FEW, MANY = 20_000, 200_000  # rows
_WORK = "import sys; from trl_cdr.bench.annotate import work; work(*sys.argv[1:])"
_MB = 2**20


class Stub:
    """Scores texts by a hash of theirs, in the place of a `DensityRatioScorer`."""

    config = CDRConfig("stub", "stub")
    criteria = router = None

    def score(self, prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[Score]:
        """As a scorer's."""
        return [
            Score(zlib.crc32(f"{prompt[0]['content']} {text}".encode()) / 2**32, n_tokens=len(text), finished=True)
            for prompt, text in zip(prompts, completions, strict=True)
        ]


def run_annotate(*, kills: int = 10, few: int = FEW, many: int = MANY) -> dict[str, Any]:
    """
    Annotate a few and many rows, many by two processes, and a few again in a run that is killed and started again.

    Args:
        kills (`int`): How often it is killed, at random moments of its work.
        few, many (`int`): Rows.

    Returns:
        `dict`: `cases` (each `rows`, `processes`, `seconds`, `rows_per_second`, `rows_per_cpu_second`, `peak_mb` of the
            largest process), `peak_ratio` of many over few rows, `kills` (those that hit) and `is_same`: whether that
            run ended with the bytes of one that was not killed.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = [_measure(folder, rows, processes) for rows, processes in ((few, 1), (many, 1), (many, 2))]
        hits = _run_killed(folder, few, kills=kills, seconds=cases[0]["seconds"])
        is_same = _hash(folder / f"out-{few}-1") == _hash(folder / "killed")
    return {
        "cases": cases,
        "peak_ratio": cases[1]["peak_mb"] / cases[0]["peak_mb"],
        "kills": hits,
        "is_same": is_same,
    }


def print_annotate(found: dict[str, Any]) -> None:
    """Print what `run_annotate` found."""
    table = Table("rows", "processes", "seconds", "rows/s", "rows a second of one core's time", "peak, MB")
    for case in found["cases"]:
        cells = (f"{case['seconds']:.1f}", f"{case['rows_per_second']:,.0f}")
        more = (f"{case['rows_per_cpu_second']:,.0f}", f"{case['peak_mb']:,.1f}")
        table.add_row(f"{case['rows']:,}", str(case["processes"]), *cells, *more)
    console = Console()
    console.print(table)
    verdict = "the same bytes as" if found["is_same"] else "OTHER BYTES THAN"
    console.print(f"peak of many over few rows: {found['peak_ratio']:.3f}")
    console.print(f"killed {found['kills']} times and started again: {verdict} a run that was not")


def work(rows: str, out: str, shard: str) -> None:
    """
    One run, in a process of its own; prints `started`, and at the end seconds and peak memory.

    Args:
        rows (`str`): The input's path.
        out (`str`): The output folder.
        shard (`str`): Which share of the rows, i/n.
    """
    arguments = AnnotateArguments(input=rows, output_dir=out, batch_size=512, shard_size=2000, shard=shard)
    made = {"strong_weights": "stub", "weak_weights": "stub", "strong_dtype": "none", "weak_dtype": "none"}
    print("started", flush=True)
    started, before = time.perf_counter(), time.process_time()
    source = open_source(rows)
    options = {**shareable_options(Stub.config), **made, "criteria_sha256": None}
    job = make_job(arguments, cast(DensityRatioScorer, Stub()), options=options)
    run(arguments, source, replace(job, load=dict))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    """This process's own peak; what `getrusage` has is also that of the process which started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / _MB


def _measure(folder: Path, rows: int, processes: int) -> dict[str, Any]:
    """Runs without interruption, side by side, each on its share of the rows."""
    path = folder / f"{rows}.jsonl"
    with path.open("w") as file:
        for index in range(rows):
            row = {"prompt": f"what is {index} + 1 ?", "completions": [f"it is {index + 1}", f"{index}"]}
            file.write(json.dumps(row) + "\n")
    out = folder / f"out-{rows}-{processes}"
    started = [_start(path, out, f"{number}/{processes}") for number in range(processes)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    seconds = max(one["seconds"] for one in found)
    return {
        "rows": rows,
        "processes": processes,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "rows_per_cpu_second": rows / sum(one["cpu_seconds"] for one in found),
        "peak_mb": max(one["peak_mb"] for one in found),
    }


def _run_killed(folder: Path, rows: int, *, kills: int, seconds: float) -> int:
    """Run, kill, run again, to the end; how often it was killed."""
    rng = random.Random(0)
    hits = 0
    while True:
        with _start(folder / f"{rows}.jsonl", folder / "killed") as process:
            assert process.stdout is not None
            process.stdout.readline()
            if hits == kills:
                process.communicate()
                return hits
            time.sleep(rng.uniform(0, 1.5 * seconds / kills))
            process.send_signal(signal.SIGKILL)
        hits += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            return hits


def _start(rows: Path, out: Path, shard: str = "0/1") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _WORK, str(rows), str(out), shard]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ))


def _hash(folder: Path) -> str:
    """Of all shards, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("data/*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
