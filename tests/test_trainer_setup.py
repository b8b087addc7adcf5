"""What a reward reads from its trainer, with the callback and without it: one contract."""

import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import TRAINING, byte_tokenizer, chat, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRConfig, CDRReward, ConfigError, OnlinePreferenceConfig, OnlinePreferenceTrainer
from trl_cdr.scoring.pair_source import PairSource
from trl_cdr.training.environment import EnvironmentReward

# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
TRAINERS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}
HELLO = [chat("hello")]
OPTIONS = {"per_device_train_batch_size": 2, "max_steps": 1, **TRAINING, "save_strategy": "no"}


def make(name, folder, reward, tokenizer, *, prompts=HELLO, policy=None, **options):
    if policy is None:
        policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    kwargs = {
        "model": policy,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": list(prompts) * 4}),
    }
    options = {**OPTIONS, **options}
    if name == "online_dpo":
        return OnlineDPOTrainer(args=OnlineDPOConfig(str(folder), max_new_tokens=4, **options), **kwargs)
    config, kind = TRAINERS[name]
    own = {} if name == "online_preference" else {"beta": 0.0}
    return kind(args=config(str(folder), max_completion_length=4, num_generations=2, **own, **options), **kwargs)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "callback"),
    [
        ("grpo", "none"),
        ("grpo", "alone"),
        ("grpo", "with_trainer"),
        ("rloo", "none"),
        ("online_preference", "none"),
        ("online_dpo", "with_trainer"),
    ],
)
def test_contract_is_the_same_with_and_without_callback(name, callback, tmp_path, checkpoints):
    """The policy's tokenizer and ends, BOS before string prompts."""
    tokenizer = byte_tokenizer(bos=True)
    reward = CDRReward(**checkpoints, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    trainer = make(name, tmp_path, reward, tokenizer, prompts=["hello"])
    trainer.eos_token_ids = [tokenizer.eos_token_id, 7]  # as TRL from 1.14.2 reads them in the generation config
    if callback != "none":
        trainer.add_callback(CDRCallback(reward, trainer if callback == "with_trainer" else None))
    trainer.train()
    scorer = reward.scorer
    assert scorer._policy is trainer.processing_class
    assert scorer._policy_ends == {tokenizer.eos_token_id, 7}
    assert scorer.form.add_special_tokens == ("false" if name == "online_dpo" else "auto")
    prompt_ids = scorer.load().strong.encoder.prompt_ids("hello")
    assert (prompt_ids[0] == tokenizer.bos_token_id) == (name != "online_dpo")


@pytest.mark.compat
def test_online_dpo_without_callback_has_no_bos(tmp_path, checkpoints, caplog):
    """Its policy reads string prompts without it."""
    tokenizer = byte_tokenizer(bos=True)
    reward = CDRReward(**checkpoints, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    make("online_dpo", tmp_path, reward, tokenizer, prompts=["hello"]).train()
    assert reward.scorer.form.add_special_tokens == "false"
    assert tokenizer.bos_token_id not in reward.scorer.load().strong.encoder.prompt_ids("hello")
    asked = CDRReward(**checkpoints, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, add_special_tokens="true")
    make("online_dpo", tmp_path, asked, tokenizer, prompts=["hello"]).train()
    assert asked.scorer.form.add_special_tokens == "true"


def test_online_dpo_without_callback_refuses_equal_models(tmp_path, checkpoints, tokenizer):
    reward = CDRReward(checkpoints["strong"], checkpoints["strong"])
    with pytest.raises(ConfigError, match="have the same weights: every log-ratio is 0"):
        make("online_dpo", tmp_path, reward, tokenizer).train()


def test_every_trainer_is_checked(tmp_path, tokenizer, strong, weak):
    """A reward that has served one trainer may score with the policy of the next one."""
    policy = llama(len(tokenizer), seed=2)
    policy.load_state_dict(weak.state_dict())
    reward = CDRReward(strong, policy, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    make("grpo", tmp_path, reward, tokenizer).train()
    with pytest.raises(ConfigError, match="the policy is one of the models that cdr_reward scores with"):
        make("grpo", tmp_path, reward, tokenizer, policy=policy).train()


def test_second_trainer_brings_its_own_tokenizer(tmp_path, checkpoints, tokenizer):
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    for each in (tokenizer, byte_tokenizer(280)):
        trainer = make("grpo", tmp_path, reward, each)
        trainer.train()
        assert reward.scorer._policy is trainer.processing_class


def test_observers_are_not_pickled(checkpoints, tmp_path, tokenizer):
    """They may hold a trainer, a policy or a file."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    trainer = make("grpo", tmp_path, reward, tokenizer)
    reward.observe(lambda call: None)
    trainer.train()
    copied = pickle.loads(pickle.dumps(reward))
    assert copied._observers == []
    assert copied([chat("hello")], ["a"]) == reward([chat("hello")], ["a"])


def test_environment_reward_follows_the_trainers_arguments(tmp_path, checkpoints, tokenizer, monkeypatch):
    monkeypatch.setenv("CDR_STRONG", checkpoints["strong"])
    monkeypatch.setenv("CDR_WEAK", checkpoints["weak"])
    reward = EnvironmentReward()
    make("grpo", tmp_path, reward, tokenizer, seed=7).train()
    assert reward.reward.config.cdr_seed == 7


def args_on(device, *, bf16=True):
    return SimpleNamespace(bf16=bf16, device=torch.device(device))


@pytest.mark.parametrize(
    ("options", "args", "dtype"),
    [
        ({}, args_on("cuda"), "bfloat16"),
        ({"cdr_device": "cuda:1"}, args_on("cuda"), "bfloat16"),
        ({"cdr_device": "cpu"}, args_on("cuda"), "auto"),  # another kind of device than the trainer's
        ({"cdr_device": "cuda"}, args_on("cpu"), "auto"),
        ({}, args_on("cpu"), "auto"),
        ({}, args_on("cuda", bf16=False), "auto"),
        ({"cdr_dtype": "float32"}, args_on("cuda"), "float32"),
        ({}, None, "auto"),
    ],
)
def test_choose_dtype_follows_the_trainer(options, args, dtype):
    assert CDRConfig("a", "b", **options).choose_dtype(args) == dtype


def test_pair_is_loaded_with_the_trainers_dtype(checkpoints):
    """Unless it was loaded before: a pair keeps its weights."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    reward.scorer.use_dtype("bfloat16")
    assert reward.scorer.describe()["strong"]["dtype"] == "bfloat16"
    reward.scorer.use_dtype("float32")
    assert reward.scorer.describe()["strong"]["dtype"] == "bfloat16"
    source: PairSource = pickle.loads(pickle.dumps(reward.scorer._source))
    assert source._dtype == "float32"


def test_set_up_loads_the_pair_with_the_chosen_dtype(tmp_path, checkpoints, tokenizer, monkeypatch):
    monkeypatch.setattr(CDRConfig, "choose_dtype", lambda self, args: "bfloat16" if args.max_steps == 1 else "auto")
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    make("grpo", tmp_path, reward, tokenizer).train()
    assert reward.scorer.describe()["weak"]["dtype"] == "bfloat16"


@pytest.mark.compat
def test_use_trainer_before_the_first_call(tmp_path, checkpoints, tokenizer):
    """All is known before anything is scored."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    trainer = make("online_dpo", tmp_path, reward, tokenizer)
    reward.use_trainer(trainer)
    assert reward.scorer.form.add_special_tokens == "false"
    assert reward.scorer._policy is trainer.processing_class
    assert reward.scorer._source._pair is not None
    assert (tmp_path / "cdr_labeling.json").is_file()


def test_prompts_are_compared_once_for_each_trainer(tmp_path, checkpoints, tokenizer, caplog):
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    other = byte_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    for each, num_warnings in ((other, 1), (tokenizer, 0), (other, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="trl_cdr.training.checks"):
            make("grpo", tmp_path, reward, each, max_steps=2).train()
        said = [record for record in caplog.records if "after other prompts than the policy's" in record.getMessage()]
        assert len(said) == num_warnings
