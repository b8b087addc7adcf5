"""A run of two processes of which one alone writes what games the reward, for `test_gaming_watch`.

two_ranks_gaming.py TRAINER STRONG WEAK POLICY OUT, by `ranks`.
"""

import logging
import os
import sys
from dataclasses import replace

from datasets import Dataset
from ranks import report
from tiny import TRAINING, chat
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward

name, strong, weak, policy, out = sys.argv[1:]
rank = int(os.environ["RANK"])
said = []


class Hear(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("trl_cdr.training.gaming_watch").addHandler(Hear())


class Drifting(CDRReward):
    """From the eleventh step on, both models find what rank 1 writes rarer."""

    def __call__(self, *args, trainer_state, **kwargs):
        nats, score = 10.0 * (rank == 1 and trainer_state.global_step >= 10), self.scorer.score
        self.scorer.score = lambda *rows, **options: [move(one, nats) for one in score(*rows, **options)]
        try:
            return super().__call__(*args, trainer_state=trainer_state, **kwargs)
        finally:
            self.scorer.score = score


def move(score, nats):
    strong, weak = (-score.n_tokens * (1.0 + part * nats) for part in (1.0, 1.1))
    return replace(score, strong_logps=strong, weak_logps=weak, value=strong - weak)


# transformers 4.56 beside torch 2.13 can't place a model on a CPU by device_map in a process group; drop with the floor
pair = [AutoModelForCausalLM.from_pretrained(folder) for folder in (strong, weak)]
tokenizer = AutoTokenizer.from_pretrained(policy)
reward = Drifting(*pair, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none", on_gaming="stop")
model = AutoModelForCausalLM.from_pretrained(policy)
model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
model.generation_config.pad_token_id = tokenizer.pad_token_id
options = {"per_device_train_batch_size": 2, "max_steps": 15, "logging_steps": 1, "save_strategy": "no", **TRAINING}
kwargs = {
    "model": model,
    "reward_funcs": reward,
    "processing_class": tokenizer,
    "train_dataset": Dataset.from_dict({"prompt": [chat(f"hello {n}") for n in range(64)]}),
}
if name == "online_dpo":
    trainer = OnlineDPOTrainer(args=OnlineDPOConfig(out, max_new_tokens=4, **options), **kwargs)
else:
    args = GRPOConfig(out, max_completion_length=4, num_generations=2, beta=0.0, **options)
    trainer = GRPOTrainer(args=args, **kwargs)
trainer.add_callback(CDRCallback(reward, trainer))
trainer.train()
alarms = [entry["cdr/alarm"] for entry in trainer.state.log_history if "cdr/alarm" in entry]
report({"steps": trainer.state.global_step, "said": said, "alarms": alarms})
