"""A run of processes that label unlike rows in unlike times, for `test_callback`.

ranks_callback.py TRAINER STRONG WEAK POLICY OUT SILENT, by `ranks`.

Some rows can't be scored; with SILENT "yes" this is every row of the last process. A callback logs on the main process
alone. Clocks tick by process: a call takes 0.25 (rank + 1) seconds, a step 1 + 3 rank. Each process has a folder of its
own, so that the files show which process writes.
"""

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset
from ranks import report
from tiny import TRAINING, byte_tokenizer, chat
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import (
    CDRCallback,
    CDRReward,
    Criteria,
    DomainCriteria,
    OnlinePreferenceConfig,
    OnlinePreferenceTrainer,
)
from trl_cdr.training import metrics_callback
from trl_cdr.training import reward as reward_module

name, strong, weak, policy, out, silent = sys.argv[1:]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
out = out if rank == 0 else f"{out}/rank{rank}"
tokenizer = byte_tokenizer(280)  # not the pair's


def clock(tick):
    ticks = itertools.count()
    return SimpleNamespace(perf_counter=lambda: tick * next(ticks))


metrics_callback.time = clock(1 + 3 * rank)
reward_module.time = clock(0.25 * (1 + rank))


class MainProcessLogs(TrainerCallback):
    """TRL's convention."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            trainer.log({"mine": 1.0})


# transformers 4.56 beside torch 2.13 can't place a model on a CPU by device_map in a process group; drop with the floor
pair = [AutoModelForCausalLM.from_pretrained(folder) for folder in (strong, weak)]
pair_tokenizer = AutoTokenizer.from_pretrained(strong)


def find_domain(prompt):
    is_known = rank < size - 1 and not prompt[-1]["content"].endswith("3")
    return "quick" if is_known else "unknown"


reward = CDRReward(
    *pair,
    strong_tokenizer=pair_tokenizer,
    weak_tokenizer=pair_tokenizer,
    criteria=Criteria({"quick": DomainCriteria("be quick"), "plain": DomainCriteria()}),
    router=find_domain if silent == "yes" else "column:kind",
    gate="none",
)
model = AutoModelForCausalLM.from_pretrained(policy)
model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
model.generation_config.pad_token_id = tokenizer.pad_token_id
options = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    **TRAINING,
}
kwargs = {
    "model": model,
    "reward_funcs": reward,
    "processing_class": tokenizer,
    "train_dataset": Dataset.from_dict(
        {"prompt": [chat(f"hello {n}") for n in range(64)], "kind": ["quick", "plain", None, "quick"] * 16}
    ),
}
if name == "online_dpo":
    trainer = OnlineDPOTrainer(args=OnlineDPOConfig(out, max_new_tokens=8, **options), **kwargs)
elif name == "grpo":
    args = GRPOConfig(out, max_completion_length=8, num_generations=2, beta=0.0, **options)
    trainer = GRPOTrainer(args=args, **kwargs)
else:
    args = OnlinePreferenceConfig(out, max_completion_length=8, num_generations=2, **options)
    trainer = OnlinePreferenceTrainer(args=args, **kwargs)
alone = None if name == "online_preference" else trainer
callback = CDRCallback(reward, alone, log_completions=name == "online_dpo")
trainer.add_callback(callback)
trainer.add_callback(MainProcessLogs())
calls = []
reward.observe(calls.append)
trainer.train()
trainer.save_model(f"{out}/final")
report(
    {
        "calls": [(call.tokens, call.scores, call.rewards) for call in calls],
        "logs": trainer.state.log_history,
        "kept": len(callback._rows),
        "records": sorted(str(path.parent.relative_to(out)) for path in Path(out).glob("**/cdr_labeling.json")),
        "processes": trainer.accelerator.num_processes,
    }
)
