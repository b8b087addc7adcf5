"""Two runs on two processes, with the pair on the policy's base and beside it, for `test_share_policy`.

python -m torch.distributed.run ... two_ranks_share.py BASE ADAPTER OUT
"""

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from test_share_policy import assert_equal_runs, run

base, adapter, out = sys.argv[1:]
rank = int(os.environ["RANK"])
runs = [run("grpo", f"{out}/{share}", base, adapter, share=share) for share in (True, False)]
assert_equal_runs(*runs)
(trainer, reward), _ = runs
weak = reward.scorer._source.get().weak.lm.model
found = {
    "processes": trainer.accelerator.num_processes,
    "wrapper": type(trainer.model_wrapped).__name__,
    "is_shared": {id(p) for p in weak.parameters()} <= {id(p) for p in trainer.model.parameters()},
    "rewards": reward.calls,
    "policy": trainer.model.state_dict(),
}
torch.save(found, f"{out}/{rank}.pt")
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo that outlives the interpreter aborts the process, now and then
