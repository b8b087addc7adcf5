"""Four processes that score together, under what leaves `from_pretrained` without weights; for `test_together`.

ranks_scores.py STRONG WEAK OTHER, by `ranks`. Nothing here may make one process wait for another for ever.
"""

import os
import sys

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

import torch
import torch.distributed as dist
from accelerate import PartialState
from ranks import report
from tiny import llama
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr import CDRReward
from trl_cdr.scoring.together import load_together, score_together

strong, weak, other = sys.argv[1:]
PartialState(cpu=True)
rank = dist.get_rank()
tokenizer = AutoTokenizer.from_pretrained(strong)
PARTS = [slice(0, 3), slice(3, 3), slice(3, 9), slice(9, 10)]  # groups of four go from one process to another


def rows():
    prompts = [f"prompt {number // 4}" for number in range(10)]
    completions = [f"hello {'world ' * number}" for number in range(10)]
    return prompts[PARTS[rank]], completions[PARTS[rank]]


def failure(action):
    """What an action raises here, and the others get to know."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def wait(found):
    """For the others: who has no error goes on at once."""
    dist.barrier()
    return found


def objects(load):
    models = {"strong": load(strong), "weak": load(weak)}
    return CDRReward(**models, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)


def on_a_cpu(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def shard(wrap):
    def load(_):
        model = llama(len(tokenizer))
        return wrap(model) or model

    return objects(load)


def load_unlike(name):
    """As with transformers 4.56 `from_pretrained` itself does here, which leaves these processes without weights."""
    model = AutoModelForCausalLM.from_pretrained(name)
    if rank % 2:
        model.model.norm.weight.data.zero_()
    return model


found = {}
rewards = {replicas: CDRReward(strong, weak, replicas=replicas, offload="disk") for replicas in ("rank", "node")}
for replicas, reward in rewards.items():
    prompts, completions = rows()
    scores = score_together(reward.scorer, prompts, completions)
    ids = tokenizer(completions).input_ids if completions else []
    paid = reward(prompts=prompts, completions=completions, completion_ids=ids, trainer_state=None)
    found[replicas] = {"scores": scores, "paid": paid, "holds": reward.scorer._source._pair is not None}
found["env"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]

scorer = rewards["node"].scorer
prompts, completions = rows()
found["alone"] = wait(failure(lambda: scorer.score(["a"], ["b"])))
longer = [*prompts, "one more"] if rank == 1 else prompts
found["uneven"] = wait(failure(lambda: score_together(scorer, longer, completions)))
odd = [lambda: 0] * len(prompts) if rank == 2 else prompts
found["unpicklable"] = wait(failure(lambda: score_together(scorer, odd, completions)))
if rank == 2:
    scorer.score = lambda *_, **__: [][0]
found["work"] = wait(failure(lambda: score_together(scorer, prompts, completions)))
if rank == 2:
    del scorer.score
found["after"] = score_together(scorer, prompts, completions)

found["differs"] = wait(failure(lambda: load_together(CDRReward(strong, other if rank == 3 else weak).scorer)))
found["nowhere"] = wait(failure(lambda: load_together(CDRReward(strong, "/nowhere" if rank == 2 else weak).scorer)))
found["objects"] = wait(failure(lambda: load_together(objects(load_unlike).scorer)))
found["fsdp1"] = wait(failure(lambda: shard(on_a_cpu).scorer.load()))
found["fsdp2"] = wait(failure(lambda: shard(fully_shard).scorer.load()))
os.environ["LOCAL_WORLD_SIZE"] = "3"
found["places"] = wait(failure(lambda: load_together(CDRReward(strong, weak, replicas="node").scorer)))
report(found)
