"""A run whose two processes label unlike rows in unlike times, for `test_callback`.

two_ranks_callback.py TRAINER STRONG WEAK POLICY OUT, by `ranks`.

Some rows can't be scored, a callback logs on the main process alone, and clocks tick by process: on rank 0 a call takes
0.25 seconds and a step 1, on rank 1 these are 0.5 and 4.
"""

import itertools
import os
import sys
from types import SimpleNamespace

from datasets import Dataset
from ranks import report
from tiny import TRAINING, byte_tokenizer, chat
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, Criteria, DomainCriteria
from trl_cdr.training import metrics_callback
from trl_cdr.training import reward as reward_module

name, strong, weak, policy, out = sys.argv[1:]
rank = int(os.environ["RANK"])
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
reward = CDRReward(
    *pair,
    strong_tokenizer=pair_tokenizer,
    weak_tokenizer=pair_tokenizer,
    criteria=Criteria({"quick": DomainCriteria("be quick"), "plain": DomainCriteria()}),
    router="column:kind",
    gate="none",
)
model = AutoModelForCausalLM.from_pretrained(policy)
model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
model.generation_config.pad_token_id = tokenizer.pad_token_id
options = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "logging_steps": 2,
    "save_strategy": "no",
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
else:
    args = GRPOConfig(out, max_completion_length=8, num_generations=2, beta=0.0, **options)
    trainer = GRPOTrainer(args=args, **kwargs)
callback = CDRCallback(reward, trainer, log_completions=name == "online_dpo")
trainer.add_callback(callback)
trainer.add_callback(MainProcessLogs())
calls = []
reward.observe(calls.append)
trainer.train()
report(
    {
        "calls": [(call.tokens, call.scores, call.rewards) for call in calls],
        "logs": trainer.state.log_history,
        "kept": len(callback._rows),
        "processes": trainer.accelerator.num_processes,
    }
)
