"""A run with completions that are a function of their prompt alone, for `test_online_preference_trainer`.

two_ranks.py POLICY STRATEGY BATCH_SIZE ACCUMULATED, by `ranks`.
"""

import random
import sys
import tempfile
from collections import Counter

from datasets import Dataset
from ranks import report
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr import OnlinePreferenceConfig, OnlinePreferenceTrainer

policy, strategy, batch_size, accumulated = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy)


def write(prompts, trainer):
    """The nth completion to a prompt is the same in every run."""
    written, seen = [], Counter()
    for prompt in prompts:
        rng = random.Random(f"{prompt} {seen[prompt]}")
        seen[prompt] += 1
        written.append([rng.randrange(10, 200) for _ in range(rng.randrange(1, 9))] + [tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(prompts).input_ids, "completion_ids": written, "logprobs": None}


def reward(prompts, completion_ids, **kwargs):
    """No ties, but nothing to learn at every second prompt."""
    scores = [sum(ids) % 97 + len(ids) / 100 for ids in completion_ids]
    scores = [0.0 if len(prompt) % 2 == 0 else score for prompt, score in zip(prompts, scores, strict=True)]
    calls.append(scores)
    return scores


calls = []
args = OnlinePreferenceConfig(
    tempfile.mkdtemp(),
    preference_loss="dpo",
    pair_strategy=strategy,
    num_generations=4,
    per_device_train_batch_size=int(batch_size),
    per_device_eval_batch_size=int(batch_size),
    gradient_accumulation_steps=int(accumulated),
    max_steps=3,
    learning_rate=0.05,
    optim="sgd",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
)
data = Dataset.from_dict({"prompt": ["word " * (number + 1) for number in range(24)]})
trainer = OnlinePreferenceTrainer(
    AutoModelForCausalLM.from_pretrained(policy),
    reward,
    args,
    train_dataset=data,
    eval_dataset=data,
    processing_class=tokenizer,
    rollout_func=write,
)
trainer.train()
trained = list(calls)
evaluation = trainer.evaluate()
names = {
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "rewards/chosen",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
}
names |= {"pairs/used", "pairs/margin", "pairs/chosen_tokens"}
logs = [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]
logs += [{f"eval_{name}": evaluation[f"eval_{name}"] for name in names - {"grad_norm"}}]
weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
report({"processes": trainer.accelerator.num_processes, "logs": logs, "weights": weights, "rewards": trained})
