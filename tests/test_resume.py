"""One seed, one run: a second run is the first bit by bit, and so is one that was stopped and resumed."""

import pytest
import torch
from datasets import Dataset
from tiny import TRAINING, chat
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-3,
    **TRAINING,
}


def constant(prompts, completions, **kwargs):
    return [float(index % 2) for index in range(len(prompts))]


def train(name, folder, reward, policy_folder, tokenizer, *, resume=None):
    """Weights after the run."""
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"] * 8
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    kwargs = {
        "model": model,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": [chat(word) for word in words]}),
    }
    if name == "online_dpo":
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(str(folder), max_new_tokens=8, **COMMON), **kwargs)
    else:
        args = GRPOConfig(str(folder), max_completion_length=8, num_generations=2, beta=0.0, **COMMON)
        trainer = GRPOTrainer(args=args, **kwargs)
    if isinstance(reward, CDRReward):
        trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return {key: weight.clone() for key, weight in trainer.model.state_dict().items()}


def same(left, right):
    return all(torch.equal(weight, right[key]) for key, weight in left.items())


@pytest.mark.parametrize("kind", ["constant", "cdr"])
@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_again_and_resumed(name, kind, tmp_path, checkpoints, tokenizer):
    def make():
        # The plain ratio: the gate would give most completions of a random policy one and the same reward.
        plain = {"gate": "none"}
        return constant if kind == "constant" else CDRReward(checkpoints["strong"], checkpoints["weak"], **plain)

    policy = checkpoints["weak"]
    whole = train(name, tmp_path / "whole", make(), policy, tokenizer)
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert not same(whole, before)
    assert same(whole, train(name, tmp_path / "again", make(), policy, tokenizer))
    resumed = train(name, tmp_path / "resumed", make(), policy, tokenizer, resume=tmp_path / "whole" / "checkpoint-2")
    assert same(whole, resumed)
