"""TRL's reward-function contract."""

import asyncio
import math
import pickle

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tiny import TRAINING, answer, byte_tokenizer, chat, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import (
    CDRReward,
    ConfigError,
    InputError,
    OnlinePreferenceConfig,
    OnlinePreferenceTrainer,
    UnscorableError,
    _compat,
)
from trl_cdr.scoring.surprise import surprise_reward


@pytest.fixture(scope="module")
def reward(checkpoints):
    """The plain ratio: what random models say of text is never typical."""
    return CDRReward(checkpoints["strong"], checkpoints["weak"], gate="none")


def test_the_contract(reward):
    rewards = reward(
        prompts=[chat("hello")] * 2,
        completions=[answer("a"), answer("what is this")],
        completion_ids=None,
        trainer_state=object(),
        log_extra=lambda column, values: None,
        a_column=[1, 2],
    )
    assert [type(value) for value in rewards] == [float, float]
    scores = reward.scorer.score([chat("hello")] * 2, ["a", "what is this"])
    assert rewards == [score.value for score in scores]


def test_name_and_kind():
    assert CDRReward("a", "b").__name__ == "cdr_reward"
    assert CDRReward("a", "b", name="safety").__name__ == "safety_reward"
    assert not isinstance(CDRReward("a", "b"), torch.nn.Module)


def test_pickling(reward):
    arguments = {"prompts": ["hello"], "completions": [" world"]}
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == "cdr_reward"
    assert copy(**arguments) == reward(**arguments)


def test_an_unscorable_row_gets_the_floor_and_is_counted(reward, caplog):
    logged = {}
    rows = {"prompts": ["hello"] * 3, "completions": ["a", None, "what is this"]}
    rewards = reward(**rows, log_metric=logged.__setitem__)
    assert rewards[1] == min(rewards[0], rewards[2]) - 1
    assert logged["cdr/unscorable"] == pytest.approx(1 / 3)
    assert logged["cdr/strong_logps"] < 0
    assert {key.split("/")[0] for key in logged} == {"cdr"}
    assert "cdr_reward: 1 of 3 completions could not be scored. The first, row 1: the completion is None" in caplog.text


def test_a_call_that_runs_beside_others_waits_for_no_process(checkpoints, monkeypatch):
    """Their order differs from process to process, so that two rewards would read one another's."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], gate="none", max_length=4, on_unscorable="floor")
    monkeypatch.setattr(reward, "_is_asked", lambda trainer: True)
    monkeypatch.setattr(_compat, "splits_groups", lambda trainer, rows: True)
    asked = []
    monkeypatch.setattr(reward.scorer.ranks, "lowest", lambda worst: asked.append(worst) or worst)
    rows = {"prompts": ["a"] * 2, "completions": ["b", "too long for it"]}
    awaited = asyncio.run(reward.awaitable(**rows))
    assert asked == []
    assert reward(**rows) == awaited
    assert awaited == [asked[0]["'a'"], asked[0]["'a'"] - 1]
    monkeypatch.setattr(_compat, "splits_groups", lambda trainer, rows: False)
    assert reward(**rows) == awaited
    assert len(asked) == 1  # groups that are whole wait for nobody


def test_the_gate_makes_the_reward_and_leaves_the_score(checkpoints, strong, tokenizer):
    """One completion is the strong model's own, the other is made of what it expects least."""
    prompt = chat("hello")
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    own, unknown = list(ids), list(ids)
    with torch.no_grad():
        for _ in range(6):
            logits = strong(torch.tensor([own])).logits[0, -1]
            own.append(int(logits[: len(tokenizer) - 2].argmax()))
            unknown.append(int(strong(torch.tensor([unknown])).logits[0, -1][: len(tokenizer) - 2].argmin()))
    rows = [own[len(ids) :], unknown[len(ids) :]]
    texts = [answer(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], gate="typicality")
    logged = {}
    rewards = reward([prompt] * 2, texts, rows, log_metric=logged.__setitem__)
    scores = reward.scorer.score([prompt] * 2, texts, completion_ids=rows)
    assert [score.gated for score in scores] == [False, True]
    assert rewards == [scores[0].value, min(scores[1].value, 0) - 1]
    assert logged["cdr/gated"] == 0.5
    assert logged["cdr/typicality"] == pytest.approx((scores[0].typicality + scores[1].typicality) / 2)
    plain = CDRReward(share=reward, name="plain", gate="none")
    assert plain([prompt] * 2, texts, rows) == pytest.approx([score.value for score in scores], abs=1e-5)
    for reduction in ("sum", "mean"):
        exact = CDRReward(share=reward, name="exact", gate="surprise", reduction=reduction)
        rewards = exact([prompt] * 2, texts, rows, log_metric=logged.__setitem__)
        scores = exact.scorer.score([prompt] * 2, texts, completion_ids=rows)
        assert [score.gated for score in scores] == [False, True]
        assert scores[0].surprise < 1 < 2 * math.log(6 / 0.01) < scores[1].surprise
        assert rewards == [
            surprise_reward(
                score.value,
                surprise=score.surprise,
                survived=score.survival,
                n_tokens=6,
                is_cut_off=True,
                reduction=reduction,
            )
            for score in scores
        ]
        assert rewards[1] < min(scores[1].value, 0) - 1
        assert logged["exact/gated"] == 0.5
        assert logged["exact/surprise"] == pytest.approx((scores[0].surprise + scores[1].surprise) / 2)
        assert logged["exact/survival"] == pytest.approx((scores[0].survival + scores[1].survival) / 2)


def test_raise_names_the_row_and_the_reason(checkpoints):
    strict = CDRReward(checkpoints["strong"], checkpoints["weak"], on_unscorable="raise")
    with pytest.raises(UnscorableError, match="row 1 can't be scored: the completion is None"):
        strict(prompts=["hello"] * 2, completions=["a", None])
    assert len(strict(prompts=["hello"], completions=["a"])) == 1


def test_lengths(reward):
    with pytest.raises(InputError, match="completions has 1 rows and prompts has 2"):
        reward(prompts=["a", "b"], completions=["c"])
    assert reward(prompts=[], completions=[]) == []


HOSTS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}
SKIPS = Version(trl.__version__).release >= (1, 6)  # GRPO and RLOO leave out what every reward function left open


def zero(prompts, **kwargs):
    return [0.0] * len(prompts)


def train(name, tmp_path, reward, *others, **options):
    """Three steps in which longer completions can't be scored: each call of the reward, and what became of its rows."""
    config, kind = HOSTS[name]
    tokenizer = byte_tokenizer()
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 2.5  # completions of many lengths
    if name == "online_dpo":
        options |= {"max_new_tokens": 8}
    else:
        options |= {"max_completion_length": 8, "num_generations": 4}
    if name in ("grpo", "rloo"):
        options |= {"beta": 0.0}
    args = config(
        str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=3,
        **TRAINING,
        save_strategy="no",
        **options,
    )
    calls, outcomes = [], []
    reward.observe(calls.append)
    prompts = [chat(word) for word in ("hello", "what is this", "the quick", "a lazy dog")] * 8
    trainer = kind(
        model=policy,
        reward_funcs=[reward, *others],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    generate = getattr(trainer, "_generate_and_score_completions", None)

    def watched(inputs):
        output = generate(inputs)
        outcomes.append(trainer._pairs if name == "online_preference" else output["advantages"].tolist())
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    missing = [score.error is not None for call in calls for score in call.scores]
    assert 0 < sum(missing) < len(missing)
    return calls, outcomes


@pytest.fixture
def short(checkpoints):
    """Rewards that hold only for short completions."""
    return lambda **options: CDRReward(checkpoints["strong"], checkpoints["weak"], max_length=6, **options)


def groups(calls, outcomes):
    """Of each group of 4: which completions could not be scored, their rewards and what became of them."""
    for call, outcome in zip(calls, outcomes, strict=True):
        for start in range(0, len(call.scores), 4):
            rows = slice(start, start + 4)
            yield [score.error is not None for score in call.scores[rows]], call.rewards[rows], outcome[rows]


# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
in_a_trainer = [pytest.mark.compat, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_a_trainer) for name in ("grpo", "rloo")])
def test_what_can_not_be_scored_moves_no_policy(name, tmp_path, short):
    reward = short()
    mixed = 0
    for missing, rewards, advantages in groups(*train(name, tmp_path, reward)):
        if not SKIPS:  # the floor: the worst of the call
            assert None not in rewards
            assert all(advantage <= 0 for advantage, gone in zip(advantages, missing, strict=True) if gone)
            continue
        assert [value is None for value in rewards] == missing
        assert all(advantage == 0 for advantage, gone in zip(advantages, missing, strict=True) if gone)
        kept = [advantage for advantage, gone in zip(advantages, missing, strict=True) if not gone]
        if 1 < len(kept) < 4:  # the others are compared with each other alone
            mixed += 1
            assert sum(kept) == pytest.approx(0, abs=1e-4)
    assert mixed > 0 or not SKIPS


@pytest.mark.parametrize("others", [(), (zero,)])
@pytest.mark.parametrize("name", [pytest.param("online_preference", marks=in_a_trainer)])
def test_what_can_not_be_scored_is_in_no_pair(name, others, tmp_path, short):
    """Beside a second reward function too: that one alone could not be compared with a sum."""
    calls, outcomes = train(name, tmp_path, short(), *others)
    used = 0
    for call, pairs in zip(calls, outcomes, strict=True):
        assert [reward is None for reward in call.rewards] == [score.error is not None for score in call.scores]
        for group, pair in enumerate(pairs):
            if not pair.skipped:
                used += 1
                assert all(call.scores[4 * group + index].error is None for index in (pair.chosen, pair.rejected))
    assert used > 0


@pytest.mark.parametrize("name", [pytest.param("online_dpo", marks=in_a_trainer)])
def test_what_can_not_be_scored_does_not_win_where_the_host_reads_none_as_0(name, tmp_path, short):
    calls, _ = train(name, tmp_path, short())
    for call in calls:
        rows = list(zip(map(repr, call.prompts), call.rewards, call.scores, strict=True))
        scored = [(prompt, reward) for prompt, reward, score in rows if score.error is None]
        for prompt, reward, score in rows:
            if score.error is not None:
                own = [value for name, value in scored if name == prompt] or [value for _, value in scored] or [0.0]
                assert reward == min(own) - 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=in_a_trainer) for name in ("grpo", "rloo")])
def test_beside_a_second_reward_none_would_win(name, tmp_path, short):
    """TRL adds up what is there: None from one of two counts 0, and honest log-ratios are often below it."""
    seen = 0
    for missing, rewards, advantages in groups(*train(name, tmp_path / "none", short(on_unscorable="none"), zero)):
        if 0 < sum(missing) < 4 and all(value is None or value < 0 for value in rewards):
            seen += 1
            assert missing[advantages.index(max(advantages))]
    assert seen > 0
    for missing, rewards, advantages in groups(*train(name, tmp_path / "auto", short(), zero)):
        assert None not in rewards
        if 0 < sum(missing) < 4:
            assert missing[advantages.index(min(advantages))]


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")
@pytest.mark.skipif(not SKIPS, reason="this TRL reads every missing reward as 0")
def test_beside_a_second_reward_that_is_normalised_by_itself_none_is_its_groups_mean(tmp_path, short):
    options = {"multi_objective_aggregation": "normalize_then_sum"}
    for missing, rewards, advantages in groups(*train("grpo", tmp_path, short(), zero, **options)):
        assert [value is None for value in rewards] == missing
        if missing == [True] * 4:
            assert len(set(advantages)) == 1


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")
def test_who_else_calls_gets_the_floor(reward, tmp_path, tokenizer):
    """A plain call, a trainer that nobody knows, and a function of the user's between the trainer and the reward."""

    class Unknown(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

    def call(kind, function):
        trainer = kind(
            model=llama(len(tokenizer), seed=2),
            reward_funcs=function,
            args=GRPOConfig(str(tmp_path), beta=0.0, num_generations=2, per_device_train_batch_size=2, **TRAINING),
            train_dataset=Dataset.from_dict({"prompt": ["hello"] * 2}),
            processing_class=tokenizer,
        )
        return reward(**rows, log_metric=trainer._log_metric)

    def halved(prompts, completions, **kwargs):
        return [value / 2 for value in reward(prompts, completions, **kwargs)]

    rows = {"prompts": ["hello"] * 2, "completions": ["a", None]}
    [value, floor] = reward(**rows, trainer_state=None)  # a trainer's call: strings are raw text
    assert floor == value - 1
    assert call(Unknown, reward) == [value, floor]
    assert call(GRPOTrainer, halved) == [value, floor]
    assert call(GRPOTrainer, reward) == [value, None if SKIPS else floor]


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_two_rewards_of_one_name_are_refused_without_a_callback(name, tmp_path, checkpoints):
    first, second = (CDRReward(checkpoints["strong"], checkpoints["weak"]) for _ in range(2))
    with pytest.raises(ConfigError, match="2 of the trainer's rewards are called cdr_reward: their metrics would mix"):
        train(name, tmp_path, first, second)
