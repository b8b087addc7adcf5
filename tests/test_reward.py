"""TRL's reward-function contract."""

import pickle

import pytest
import torch
from tiny import answer, chat

from trl_cdr import CDRReward, InputError, Score, UnscorableError
from trl_cdr.training.reward import rewards_from_scores


@pytest.fixture(scope="module")
def reward(checkpoints):
    """The plain ratio: what random models say of text is never typical."""
    return CDRReward(checkpoints["strong"], checkpoints["weak"], typicality=float("inf"))


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


def score(value):
    return Score(value) if value is not None else Score(None, error="the reason")


@pytest.mark.parametrize(
    ("values", "policy", "expected"),
    [
        ([1.0, None, -2.0], "floor", [1.0, -3.0, -2.0]),
        ([5.0, None], "floor", [5.0, 4.0]),
        ([None, None], "floor", [-1.0, -1.0]),
        ([None, -7.5], "floor", [-8.5, -7.5]),
        ([1.0, None], "none", [1.0, None]),
        ([], "floor", []),
    ],
)
def test_rewards_from_scores(values, policy, expected):
    assert rewards_from_scores([score(value) for value in values], on_unscorable=policy) == expected


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
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    logged = {}
    rewards = reward([prompt] * 2, texts, rows, log_metric=logged.__setitem__)
    scores = reward.scorer.score([prompt] * 2, texts, completion_ids=rows)
    assert [score.gated for score in scores] == [False, True]
    assert rewards == [scores[0].value, min(scores[1].value, 0) - 1]
    assert logged["cdr/gated"] == 0.5
    assert logged["cdr/typicality"] == pytest.approx((scores[0].typicality + scores[1].typicality) / 2)
    plain = CDRReward(share=reward, name="plain", typicality=float("inf"))
    assert plain([prompt] * 2, texts, rows) == pytest.approx([score.value for score in scores], abs=1e-5)


def test_raise_names_the_row_and_the_reason(checkpoints):
    strict = CDRReward(checkpoints["strong"], checkpoints["weak"], on_unscorable="raise")
    with pytest.raises(UnscorableError, match="row 1 can't be scored: the completion is None"):
        strict(prompts=["hello"] * 2, completions=["a", None])
    assert len(strict(prompts=["hello"], completions=["a"])) == 1


def test_lengths(reward):
    with pytest.raises(InputError, match="completions has 1 rows and prompts has 2"):
        reward(prompts=["a", "b"], completions=["c"])
    assert reward(prompts=[], completions=[]) == []
