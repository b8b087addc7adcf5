"""Two runs on two processes, with the pair on the policy's base and beside it, for `test_share_policy`.

two_ranks_share.py BASE ADAPTER OUT, by `ranks`.
"""

import sys

from ranks import report
from test_share_policy import assert_equal_runs, run

base, adapter, out = sys.argv[1:]
runs = [run("grpo", f"{out}/{share}", base, adapter, share=share) for share in (True, False)]
assert_equal_runs(*runs)
(trainer, reward), _ = runs
weak = reward.scorer._source.get().weak.lm.model
report(
    {
        "processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "is_shared": {id(p) for p in weak.parameters()} <= {id(p) for p in trainer.model.parameters()},
        "rewards": reward.calls,
        "policy": trainer.model.state_dict(),
    }
)
