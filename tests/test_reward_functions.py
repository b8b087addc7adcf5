"""Objectives on one pair and rewards by name; what is refused stands in test_train, as YAML."""

import sys

import pytest
from trl import GRPOConfig
from trl.rewards import think_format_reward

from trl_cdr import CDRConfig, ConfigError
from trl_cdr.training.reward_functions import find_reward, make_rewards, reward_name

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture
def args(tmp_path):
    return GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", seed=7)


def test_objectives_share_the_pair_and_what_they_leave_open(args, checkpoints):
    common = CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_max_length=200, cdr_reduction="mean")
    objectives = [{"name": "a"}, {"name": "b", "criteria": "safety", "reduction": "sum"}, {"name": "c", "seed": 1}]
    a, b, c = make_rewards(common, args, objectives=objectives)
    assert [reward_name(reward) for reward in (a, b, c)] == ["a_reward", "b_reward", "c_reward"]
    assert [reward.config.cdr_reduction for reward in (a, b, c)] == ["mean", "sum", "mean"]
    assert [reward.config.cdr_seed for reward in (a, b, c)] == [7, 7, 1]
    assert [reward.config.cdr_max_length for reward in (a, b, c)] == [200] * 3
    assert [reward.scorer.criteria is None for reward in (a, b, c)] == [True, False, True]
    assert len({id(reward.scorer._source) for reward in (a, b, c)}) == 1


def test_rewards_by_name():
    assert find_reward("think_format_reward") is find_reward("trl.rewards.think_format_reward") is think_format_reward


@pytest.mark.parametrize(
    "name", ["get_soft_overlong_punishment", "trl.rewards.get_soft_overlong_punishment", "trl_cdr.CDRReward", "os.sep"]
)
def test_what_is_no_reward_function(name):
    with pytest.raises(ConfigError, match=f"reward_funcs has {name!r}, which is no reward function"):
        find_reward(name)


def test_the_names_that_there_are():
    with pytest.raises(ConfigError, match="one of TRL's own: .*think_format_reward.$"):
        find_reward("think_reward")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (".foo.bar", "", "TypeError: "),
        ("broken.reward", "def reward(:", r"SyntaxError: .*broken.py, line 1"),
        ("broken.reward", "raise RuntimeError('no\\nGPU')", "RuntimeError: no GPU"),
        ("broken.reward", "", "AttributeError: module 'broken' has no attribute 'reward'"),
        ("no.such", "", "ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_a_module_that_fails(name, content, reason, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ConfigError, match=rf"^reward_funcs has {name!r}, which can't be imported \({reason}") as caught:
        find_reward(name)
    assert "\n" not in str(caught.value)


def test_two_of_one_name(args, checkpoints):
    common = CDRConfig(checkpoints["strong"], checkpoints["weak"])
    with pytest.raises(ConfigError, match="two reward functions are called think_format_reward"):
        make_rewards(common, args, names=["think_format_reward", "trl.rewards.think_format_reward"])
    with pytest.raises(ConfigError, match="two reward functions are called think_format_reward"):
        make_rewards(common, args, objectives=[{"name": "think_format"}], names=["think_format_reward"])
