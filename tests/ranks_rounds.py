"""Rounds in processes of their own, for `test_rounds`: killed again and again, or shared by two.

ranks_rounds.py CONFIG OUTPUT_DIR, by `ranks`. One process forks a child for each moment at which it is killed, and
finishes what the last of them left.
"""

import os
import signal
import sys
import time

from ranks import report
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerState  # noqa: F401 - here, not in each child
from trl.experimental.cpo import CPOTrainer  # noqa: F401 - likewise

from trl_cdr.annotation import annotate
from trl_cdr.cli import main
from trl_cdr.rounds import rounds

config, output_dir = sys.argv[1:]
command = ["rounds", "--config", config, "--output_dir", output_dir]
MOMENTS = (
    (annotate, "label_rows", 2, False),  # in the completions of the first round
    (TrainerState, "save_to_json", 2, False),  # while the second checkpoint is saved, of which it is the last file
    (PreTrainedTokenizerBase, "save_pretrained", 2, False),  # while the policy is saved, behind its weights
    (rounds, "train_round", 1, True),  # between the rounds
    (annotate, "label_rows", 2, False),  # in the completions of the second
)


def kill_at(owner, name, call, after):
    """Have a function kill the process at its so-many-th call."""
    real, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, killing)


def late(rows, **kwargs):
    """As `label_rows`, when another process that does not wait has long come to the training."""
    time.sleep(2)
    return label_rows(rows, **kwargs)


label_rows = annotate.label_rows
if os.environ.get("RANK") == "1":
    annotate.label_rows = late
signals = []
for moment in MOMENTS if "RANK" not in os.environ else ():
    child = os.fork()
    if child == 0:
        kill_at(*moment)
        main(command)
        os._exit(0)
    signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
main(command)
report(signals)
