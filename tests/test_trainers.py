"""The same object in TRL's own trainers: what they hand over is scored to the last token."""

import logging

import pytest
import torch
from datasets import Dataset
from oracle import completion_logps, render, typicality
from tiny import TRAINING, byte_tokenizer, chat, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRReward

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
WORDS = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    **TRAINING,
    "save_strategy": "no",
    "logging_steps": 1,
}


class Recorder(CDRReward):
    """A reward that keeps what it was called with."""

    calls = ()

    def __call__(self, prompts, completions, completion_ids=None, **kwargs):
        rewards = super().__call__(prompts, completions, completion_ids, **kwargs)
        self.calls = [*self.calls, (prompts, completions, completion_ids, rewards)]
        return rewards


def make(name, tmp_path, reward, tokenizer, prompts, policy):
    data = Dataset.from_dict({"prompt": prompts, "note": ["x"] * len(prompts)})
    kwargs = {"model": policy, "processing_class": tokenizer, "reward_funcs": reward, "train_dataset": data}
    # A special token that a random policy writes last, and that ends no turn, would be told from padding by nobody.
    never = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    options = {**COMMON, "generation_kwargs": {"suppress_tokens": never}}
    if name == "online_dpo":
        return OnlineDPOTrainer(args=OnlineDPOConfig(str(tmp_path), max_new_tokens=8, **options), **kwargs)
    config, trainer = (GRPOConfig, GRPOTrainer) if name == "grpo" else (RLOOConfig, RLOOTrainer)
    args = config(str(tmp_path), max_completion_length=8, num_generations=2, beta=0.0, **options)
    return trainer(args=args, **kwargs)


def expected_reward(prompt, ids, tokenizer, name, pair):
    ends = {tokenizer.eos_token_id}
    cut = next((index + 1 for index, token in enumerate(ids) if token in ends), None)
    ids = ids[:cut] if cut else [token for token in ids if token != tokenizer.pad_token_id]
    # GRPO and RLOO put BOS before a string prompt where the tokenizer does; conversations have what the template says
    prompt_ids = tokenizer(render(tokenizer, prompt), add_special_tokens=isinstance(prompt, str)).input_ids
    if isinstance(prompt, str) and name == "online_dpo":
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    strong, weak = (completion_logps(model, prompt_ids, ids).sum() for model in pair)
    ratio = float(strong - weak)
    is_gated = typicality(pair[0], prompt_ids, ids) < -1.5
    return min(ratio, 0) - 1 if is_gated else ratio, cut is not None


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("name", ["online_dpo", "grpo", "rloo"])
def test_three_steps(name, conversational, tmp_path, checkpoints, strong, weak, caplog):
    tokenizer = byte_tokenizer(bos=True)
    if name == "online_dpo":
        tokenizer.pad_token = tokenizer.eos_token  # padding that looks like the end of a turn
    policy = llama(len(tokenizer), seed=2)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 2  # some completions end, some are cut off
    reward = Recorder(
        checkpoints["strong"],
        checkpoints["weak"],
        strong_tokenizer=tokenizer,
        weak_tokenizer=tokenizer,
        gate="typicality",
    )
    prompts = [chat(word) if conversational else word for word in WORDS * 4]
    trainer = make(name, tmp_path, reward, tokenizer, prompts, policy)
    before = [parameter.clone() for parameter in policy.parameters()]
    with caplog.at_level(logging.WARNING, logger="trl_cdr"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("trl_cdr")]
    assert trainer.state.global_step == 3
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    ended = []
    assert len(reward.calls) == 3
    for call_prompts, completions, ids, rewards in reward.calls:
        assert len(rewards) == len(completions) == (8 if name == "online_dpo" else 4)
        for prompt, row, value in zip(call_prompts, ids, rewards, strict=True):
            expected, is_finished = expected_reward(prompt, row, tokenizer, name, (strong, weak))
            assert value == pytest.approx(expected, abs=1e-4)
            ended.append(is_finished)
    assert 0 < sum(ended) < len(ended)
    logs = {key for entry in trainer.state.log_history for key in entry}
    if name != "online_dpo":
        assert {"cdr/unscorable", "cdr/truncated", "cdr/gated", "cdr/typicality", "rewards/cdr_reward/mean"} <= logs
    else:
        assert "rewards/margins" in logs


def test_the_trainers_tokenizer_tells_finished_completions_where_the_pairs_differs(tmp_path, checkpoints):
    """GRPO's log_metric is a bound method of the trainer: the one way to the policy's end tokens."""
    policy_tokenizer = byte_tokenizer(280)
    policy = llama(len(policy_tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = policy_tokenizer.eos_token_id
    reward = Recorder(checkpoints["strong"], checkpoints["weak"], gate="none")
    trainer = make("grpo", tmp_path, reward, policy_tokenizer, [chat(word) for word in WORDS * 4], policy)
    trainer.train()
    prompts, completions, ids, rewards = reward.calls[0]
    finished = [policy_tokenizer.eos_token_id in row for row in ids]
    offline = reward.scorer.score(prompts, completions, finished=finished)
    assert rewards == [score.value if score.value is not None else min(rewards) for score in offline]


@pytest.mark.parametrize("name", ["online_dpo", "grpo", "rloo"])
def test_a_pair_that_sleeps_labels_alike_and_sleeps_while_the_policy_is_at_work(name, tmp_path, checkpoints):
    """That is when vLLM may be awake in the trainer's process, and when the optimizer needs the memory."""
    tokenizer = byte_tokenizer()
    found, awake = [], []
    for offload in ("none", "disk"):
        reward = Recorder(**checkpoints, offload=offload)
        policy = llama(len(tokenizer), seed=2)
        policy.save_pretrained(tmp_path / "policy")
        policy = type(policy).from_pretrained(tmp_path / "policy")
        trainer = make(name, tmp_path / "out", reward, tokenizer, [chat(word) for word in WORDS], policy)
        reward.scorer.load()

        def look(*_, reward=reward):
            pair = reward.scorer._source._pair
            weights = [p for member in (pair.strong, pair.weak) for p in member.lm.model.parameters()]
            awake.append(not all(p.untyped_storage().nbytes() <= 4 for p in weights))

        if offload == "disk":
            policy.register_forward_pre_hook(look)
        trainer.train()
        found.append(([call[3] for call in reward.calls], [p.detach() for p in policy.parameters()]))
    assert awake
    assert not any(awake)
    (rewards, weights), (others, other_weights) = found
    assert len(rewards) == 3
    assert rewards == others
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))
