"""Three steps of trainers on the pair's rewards, with completions that are a function of their prompt and their
number alone, for `test_together`.

ranks_train.py STRONG WEAK POLICY OUT REPLICAS TRAINER..., by `ranks`. Eight completions a step, of all processes.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from ranks import report
from tiny import TRAINING, chat
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, OnlinePreferenceConfig, OnlinePreferenceTrainer

strong, weak, policy, out, replicas, *names = sys.argv[1:]
state = PartialState(cpu=True)
tokenizer = AutoTokenizer.from_pretrained(policy)
GROUP = {"online_dpo": 2, "grpo": 4, "online_preference": 2}
name = ""


def draw(probs, num_samples, **_):
    """In place of chance: the token at a quantile that depends on the completion's number and the likeliest token."""
    rows = len(probs)
    if name == "online_dpo":  # all first completions, then all second ones
        numbers = torch.arange(rows) // (rows // 2)
    else:  # a group's follow one another, maybe on several processes
        numbers = (state.process_index * rows + torch.arange(rows)) % GROUP[name]
    quantiles = (0.37 * numbers + 0.618034 * probs.argmax(dim=1)) % 1
    return (probs.double().cumsum(dim=1) < quantiles[:, None]).sum(dim=1, keepdim=True).clamp(max=probs.shape[1] - 1)


def train():
    # Where groups go from one process to another, so does the floor of what can't be scored: the longest completions.
    limits = {"max_length": 6, "on_unscorable": "floor"} if name == "grpo" else {}
    reward = CDRReward(strong, weak, replicas=replicas, gate="none", **limits)
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = 8 // state.num_processes
    options = {
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        **TRAINING,
    }
    kwargs = {
        "model": model,
        "reward_funcs": reward,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"prompt": [chat("hello " * (number % 5 + 1)) for number in range(24)]}),
    }
    folder = f"{out}/{name}"
    if name == "online_dpo":
        args = OnlineDPOConfig(folder, max_new_tokens=6, per_device_train_batch_size=batch // 2, **options)
        trainer = OnlineDPOTrainer(args=args, **kwargs)
    else:
        config, kind = {
            "grpo": (GRPOConfig, GRPOTrainer),
            "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
        }[name]
        options |= {"max_completion_length": 6, "num_generations": GROUP[name], "per_device_train_batch_size": batch}
        trainer = kind(args=config(folder, **options), **kwargs)
    trainer.add_callback(CDRCallback(reward, trainer))
    calls = []
    unscorable = []

    def keep(call):
        calls.append(list(zip(map(str, call.completions), call.rewards, strict=True)))
        unscorable.append([score.error is not None for score in call.scores])

    reward.observe(keep)
    trainer.train()
    learnt = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "processes": trainer.accelerator.num_processes,
        "moved": max((now - then).abs().max() for now, then in zip(learnt.parameters(), before, strict=True)),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "calls": calls,
        "unscorable": unscorable,
        "weights": learnt.state_dict(),
        "holds": reward.scorer._source._pair is not None,
        "record": Path(folder, "cdr_labeling.json").is_file(),
    }


torch.multinomial = draw
found = {}
for name in names:
    found[name] = train()
report(found)
