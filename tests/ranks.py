"""Runs of several processes each, for tests: `launch` has a script run in all of them and collects what they report.

Importing is most of what a small run costs, so that one process imports, and becomes all the others by forking. It is
`python ranks.py ...`, not pytest's own, since a fork takes no threads along. Each has the variables of `torchrun`.
"""

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclasses.dataclass
class Run:
    """
    A script of this folder as so many processes, which are to think that they are on so many machines. One process
    alone gets no variables.
    """

    script: str
    arguments: list[str]
    processes: int = 2
    nodes: int = 1


def launch(*runs, timeout=240):
    """For each run what its processes report, by rank. One that fails fails a test, and so do `timeout` seconds."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, json.dumps([dataclasses.asdict(run) for run in runs])]
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the others
            _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        return [
            [torch.load(Path(folder, f"{number}-{rank}.pt"), weights_only=False) for rank in range(run.processes)]
            for number, run in enumerate(runs)
        ]


def report(found):
    """Within a script: hand over what this process has found."""
    import torch

    torch.save(found, os.environ["RANKS_REPORT"])


def main(folder, runs):
    # All that scripts import, once.
    from trl import GRPOTrainer  # noqa: F401

    import trl_cdr.training.callback
    import trl_cdr.training.online_preference_trainer  # noqa: F401

    started = set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for number, given in enumerate(json.loads(runs)):
            run = Run(**given)
            port = _free_port()
            for rank in range(run.processes):
                child = os.fork()
                if child == 0:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    os.environ["RANKS_REPORT"] = str(Path(folder, f"{number}-{rank}.pt"))
                    if run.processes > 1:
                        os.environ |= _place(run, rank, port)
                    _become(run)
                started.add(child)
            while started:
                child, status = os.wait()
                started.discard(child)
                if status:
                    sys.exit(1)
    finally:
        for child in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _place(run, rank, port):
    size = run.processes // run.nodes
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(run.processes),
        "LOCAL_RANK": str(rank % size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _become(run):
    """The script; never returns."""
    import torch

    status = 1
    try:
        sys.argv = [run.script, *run.arguments]
        runpy.run_path(str(Path(__file__).with_name(run.script)), run_name="__main__")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # who leaves first would break what others still do
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # a thread of gloo that outlives the interpreter aborts the process, now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
