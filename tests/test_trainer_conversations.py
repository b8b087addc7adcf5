"""Trainers render prompts with variables and tools; the pair scores after the very same tokens."""

import logging
import pickle
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from oracle import completion_logps
from packaging.version import Version
from tiny import CHATML, DATED, THINKING, TRAINING, byte_tokenizer, chat, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import (
    CDRCallback,
    CDRConfig,
    CDRReward,
    ConfigError,
    DensityRatioScorer,
    OnlinePreferenceConfig,
    OnlinePreferenceTrainer,
)
from trl_cdr._compat import policy_prompt_ids
from trl_cdr.annotation.writers import load_policy

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")
PROMPTS = [chat("hello"), chat("what is this"), chat("the quick brown fox"), chat("system:be kind", "a lazy dog")]
KINDS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}


class Recorder(CDRReward):
    """A reward that keeps what it was called with."""

    calls = ()

    def __call__(self, prompts, completions, completion_ids=None, **kwargs):
        rewards = super().__call__(prompts, completions, completion_ids, **kwargs)
        self.calls = [*self.calls, (prompts, completion_ids, rewards)]
        return rewards


@pytest.fixture
def tokenizer():
    return byte_tokenizer(template=THINKING)


@pytest.fixture
def pair(tokenizer):
    return [llama(len(tokenizer), seed=seed, positions=2048) for seed in (0, 1)]


def make_reward(pair, tokenizer, **options):
    options = {"gate": "none"} | options
    return Recorder(*pair, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, **options)


def make_trainer(name, tmp_path, reward, tokenizer, prompts=PROMPTS, *, tools=None, **options):
    config, kind = KINDS[name]
    never = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    common = {"max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 1}
    common |= {"generation_kwargs": {"suppress_tokens": never}, "save_strategy": "no", "beta": 0.0, **TRAINING}
    if name == "online_preference":
        common.pop("beta")
    return kind(
        model=llama(len(tokenizer), seed=2, positions=2048),
        reward_funcs=reward,
        args=config(str(tmp_path), **common, **options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        **({} if tools is None else {"tools": tools}),
    )


def assert_policys_prompts(trainer, reward, pair):
    """Rewards are the log-ratios after the tokens that the trainer makes of the prompts, in float64."""
    strong, weak = pair
    assert reward.calls
    for prompts, completion_ids, rewards in reward.calls:
        policy_ids = policy_prompt_ids(trainer, list(prompts))
        for prompt_ids, ids, reward_ in zip(policy_ids, completion_ids, rewards, strict=True):
            ids = [int(id) for id in ids]
            expected = completion_logps(strong, prompt_ids, ids).sum() - completion_logps(weak, prompt_ids, ids).sum()
            assert reward_ == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.compat
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_rewards_after_the_policys_prompt(name, thinking, tmp_path, tokenizer, pair, caplog):
    reward = make_reward(pair, tokenizer)
    trainer = make_trainer(name, tmp_path, reward, tokenizer, chat_template_kwargs={"enable_thinking": thinking})
    trainer.train()
    assert_policys_prompts(trainer, reward, pair)
    shown = tokenizer.decode(policy_prompt_ids(trainer, [PROMPTS[0]])[0])
    assert shown.endswith("</think>\n\n") is not thinking
    assert "other prompts" not in caplog.text


def multiply(a: int, b: int) -> int:
    """
    Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13"), reason="TRL parses tool calls by a library before it"
)
@pytest.mark.parametrize("name", ["grpo", "online_preference"])
@pytest.mark.parametrize("thinking", [False, True])
def test_rewards_after_the_policys_prompt_with_tools(name, thinking, tmp_path, pair, caplog):
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template=template)
    reward = make_reward(pair, tokenizer)
    options = {"chat_template_kwargs": {"enable_thinking": thinking}}
    trainer = make_trainer(name, tmp_path, reward, tokenizer, tools=[multiply], **options)
    trainer.train()
    assert "Multiply two numbers" in tokenizer.decode(policy_prompt_ids(trainer, [PROMPTS[0]])[0])
    assert_policys_prompts(trainer, reward, pair)
    assert "other prompts" not in caplog.text


@pytest.mark.parametrize("name", KINDS)
def test_variables_that_differ_raise(name, tmp_path, tokenizer, pair):
    reward = make_reward(pair, tokenizer, chat_template_kwargs={"enable_thinking": True})
    trainer = make_trainer(name, tmp_path, reward, tokenizer, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"cdr_chat_template_kwargs is .*True.* the trainer's .*False"):
        trainer.train()


def test_variables_that_differ_raise_before_training(tmp_path):
    args = GRPOConfig(str(tmp_path), chat_template_kwargs={"enable_thinking": False}, **TRAINING)
    config = CDRConfig("a", "b", cdr_chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ConfigError, match="Leave out cdr_chat_template_kwargs"):
        CDRReward.from_config(config, args)
    same = CDRConfig("a", "b", cdr_chat_template_kwargs={"enable_thinking": False})
    for config in (same, CDRConfig("a", "b")):
        assert CDRReward.from_config(config, args).config.cdr_chat_template_kwargs == {"enable_thinking": False}


def test_next_trainers_variables_replace_the_first(tmp_path, tokenizer, pair):
    reward = make_reward(pair, tokenizer)
    for thinking in (False, True):
        reward.calls = []
        options = {"chat_template_kwargs": {"enable_thinking": thinking}}
        trainer = make_trainer("grpo", tmp_path, reward, tokenizer, **options)
        trainer.add_callback(CDRCallback(reward, trainer))
        trainer.train()
        assert_policys_prompts(trainer, reward, pair)


def test_callback_without_trainer_takes_variables_over(tmp_path, tokenizer, pair):
    reward = make_reward(pair, tokenizer)
    trainer = make_trainer("grpo", tmp_path, reward, tokenizer, chat_template_kwargs={"enable_thinking": False})
    trainer.add_callback(CDRCallback(reward))
    trainer.train()
    assert_policys_prompts(trainer, reward, pair)


OTHERS = {
    "another template": {"chat_template": CHATML.replace("assistant\n", "assistant:\n")},
    "a system turn": {"chat_template": "<|im_start|>system\nbe brief<|im_end|>\n" + CHATML},
    "variables": {"chat_template_kwargs": {"enable_thinking": False}},
    "strings as turns": {"string_prompts": "user", "prompts": ["hello", "what", "this", "that"]},
    "no BOS": {"add_special_tokens": "true", "prompts": ["hello", "what", "this", "that"]},
}


@pytest.mark.compat
@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_other_prompts_are_one_warning(name, difference, tmp_path, tokenizer, pair, caplog):
    options = dict(OTHERS[difference])
    prompts = options.pop("prompts", PROMPTS)
    if "chat_template" in options:
        path = tmp_path / "template.jinja"
        path.write_text(options["chat_template"])
        options["chat_template"] = str(path)
    reward = make_reward(pair, tokenizer, **options)
    trainer = make_trainer(name, tmp_path, reward, tokenizer, prompts)
    trainer.args.max_steps = 2
    with caplog.at_level(logging.WARNING):
        trainer.train()
    [warning] = [record.getMessage() for record in caplog.records if "other prompts" in record.getMessage()]
    assert "cdr_reward scores completions after other prompts than the policy's. From token" in warning
    assert "the policy reads '" in warning


def test_other_prompts_of_weak_alone(tmp_path, tokenizer, pair, caplog):
    """Weak has a template of its own. A tokenizer with another vocabulary can't be compared."""
    weak = byte_tokenizer(template=CHATML)
    for weak_tokenizer, is_told in ((weak, True), (byte_tokenizer(300, template=CHATML), False)):
        caplog.clear()
        models = [pair[0], llama(len(weak_tokenizer), seed=1)]
        reward = CDRReward(*models, strong_tokenizer=tokenizer, weak_tokenizer=weak_tokenizer, gate="none")
        weak_tokenizer.chat_template = CHATML.replace("assistant\n", "assistant:\n")
        make_trainer("grpo", tmp_path, reward, tokenizer).train()
        assert ("and weak reads" in caplog.text) is is_told
        assert "and strong reads" not in caplog.text


@pytest.mark.compat
@pytest.mark.parametrize(("thinking", "is_told"), [(None, False), (False, True)])
def test_online_dpo_prompts_are_compared(thinking, is_told, tmp_path, tokenizer, pair, caplog):
    """Its trainer has no variables: those of the pair are told from the policy's prompt."""
    kwargs = None if thinking is None else {"enable_thinking": thinking}
    reward = make_reward(pair, tokenizer, chat_template_kwargs=kwargs)
    trainer = OnlineDPOTrainer(
        model=llama(len(tokenizer), seed=2, positions=2048),
        reward_funcs=reward,
        args=OnlineDPOConfig(
            str(tmp_path), max_new_tokens=4, per_device_train_batch_size=4, max_steps=1, save_strategy="no", **TRAINING
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    assert ("cdr_reward scores completions after other prompts" in caplog.text) is is_told


def test_parsed_message_is_scored_by_its_ids(pair, tokenizer):
    """A trainer puts thoughts and tool calls into fields of their own; the ids hold all of them."""
    reward = make_reward(pair, tokenizer)
    reward.scorer.use_policy_tokenizer(tokenizer)
    text = "<think>\nthis\n</think>\n\nwhat "
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "assistant", "content": "what", "reasoning_content": "this"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    prompt_ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = sum(
        sign * completion_logps(model, prompt_ids, ids).sum() for sign, model in zip((1, -1), pair, strict=True)
    )
    rewards = reward([PROMPTS[0]] * 2, [[message] for message in messages], [ids] * 2)
    torch.testing.assert_close(rewards, [float(expected)] * 2, rtol=0, atol=1e-3)
    other = reward.scorer.score([PROMPTS[0]], [[messages[0]]])[0]  # without ids nobody knows how it was written
    assert "holds reasoning_content apart" in other.error


@pytest.mark.parametrize("rows", [[False] * 4, [True, False, True, False]])
def test_online_dpo_reads_the_data_sets_variables(rows, tmp_path, tokenizer, pair, caplog):
    """It renders each prompt with the variables of its row; rows of one batch that differ are one warning."""
    reward = make_reward(pair, tokenizer)
    data = {"prompt": PROMPTS, "chat_template_kwargs": [{"enable_thinking": row} for row in rows]}
    args = OnlineDPOConfig(
        str(tmp_path), max_new_tokens=4, per_device_train_batch_size=4, max_steps=2, save_strategy="no", **TRAINING
    )
    trainer = OnlineDPOTrainer(
        model=llama(len(tokenizer), seed=2, positions=2048),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    told = [record.getMessage() for record in caplog.records if "differs between rows" in record.getMessage()]
    assert len(told) == (len(set(rows)) - 1)
    assert "other prompts" not in caplog.text
    if not told:
        prompts, completion_ids, rewards = reward.calls[0]
        for prompt, ids, value in zip(prompts, completion_ids, rewards, strict=True):
            prompt_ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, enable_thinking=False
            )["input_ids"]
            strong, weak = (completion_logps(model, prompt_ids, [int(id) for id in ids]).sum() for model in pair)
            assert value == pytest.approx(float(strong - weak), abs=1e-3)


def test_tools_and_variables_are_pickled():
    """Tools are kept as schemas: a function of a notebook can't be pickled."""
    scorer = DensityRatioScorer("a", "b")
    scorer.use_conversations({"enable_thinking": False}, [multiply])
    form = pickle.loads(pickle.dumps(scorer)).form
    kwargs, [schema] = form.template_kwargs, form.tools
    assert kwargs == {"enable_thinking": False}
    assert schema["function"]["name"] == "multiply"


def test_annotate_writes_with_the_pairs_date(tmp_path):
    """The policy's own prompt has the date of the run, not the clock's."""
    tokenizer = byte_tokenizer(template=DATED)
    folder = str(tmp_path / "model")
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = CDRConfig(folder, folder, cdr_date="2026-11-29")
    pair = DensityRatioScorer.from_config(config).load()
    policy = load_policy(folder, config, pair)
    ids = [member.encoder.prompt_ids(PROMPTS[0]) for member in (policy, pair.strong)]
    assert ids[0] == ids[1]
    assert "29 November 2026" in tokenizer.decode(ids[0])
