"""`trl_cdr.cdr_reward`: a reward without arguments, for scripts that import it by name."""

import pickle

import pytest
import torch
from tiny import answer, chat

import trl_cdr
from trl_cdr import CDRConfig, CDRReward, ConfigError
from trl_cdr.training.environment import EnvironmentReward, read_environment

PAIR = {"CDR_STRONG": "a", "CDR_WEAK": "b"}


def test_types_are_those_of_the_fields():
    environment = {
        **PAIR,
        "CDR_GATE": "none",
        "CDR_TOKEN_BUDGET": "512",
        "CDR_CHAT_TEMPLATE_KWARGS": '{"enable_thinking": false}',
        "CDR_CRITERIA": "safety+reasoning",
        "CDR_ROUTER": "likelihood",
        "CDR_STRONG_ADAPTER": "c",
        "CDR_STRONG_ADAPTER_REVISION": "v2",
        "CDR_SHARE_POLICY": "true",
        "CDR_MAX_LENGTH": " ",  # empty: not set
        "TRL_CDR_CACHE": "/elsewhere",  # other prefixes are other people's
        "CDROM": "1",
    }
    assert read_environment(environment) == CDRConfig(
        "a",
        "b",
        cdr_strong_adapter="c",
        cdr_strong_adapter_revision="v2",
        cdr_share_policy=True,
        cdr_gate="none",
        cdr_token_budget=512,
        cdr_chat_template_kwargs={"enable_thinking": False},
        cdr_criteria="safety+reasoning",
        cdr_router="likelihood",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CDR_STRONG": ""}, "CDR_STRONG is not set: trl_cdr.cdr_reward takes its options from the environment"),
        ({"CDR_WEAK": ""}, "CDR_WEAK is not set"),
        ({"CDR_STRNOG": "a"}, "CDR_STRNOG is set and is no option. Unset it, or use one of: CDR_STRONG, CDR_WEAK"),
        ({"CDR_TOKEN_BUDGET": "many"}, "In the environment: argument --cdr_token_budget.*: invalid int value: 'many'"),
        ({"CDR_REDUCTION": "max"}, "In the environment: argument --cdr_reduction.*: invalid choice: 'max'"),
        ({"CDR_GATE": "off"}, "In the environment: argument --cdr_gate.*: invalid choice: 'off'"),
        ({"CDR_TYPICALITY": "-1"}, "In the environment: cdr_typicality is -1.0"),
        ({"CDR_MODEL_INIT_KWARGS": "{'a': 1}"}, "In the environment: cdr_model_init_kwargs is .* no JSON"),
    ],
)
def test_what_is_refused_names_the_variable(change, message):
    with pytest.raises(ConfigError, match=message):
        read_environment(PAIR | change)


def test_the_environment_is_read_at_the_first_call(monkeypatch, checkpoints):
    reward = EnvironmentReward()
    rows = {"prompts": [chat("hello")] * 2, "completions": [answer("a"), answer("what is this")]}
    monkeypatch.delenv("CDR_STRONG", raising=False)
    with pytest.raises(ConfigError, match="CDR_STRONG is not set"):
        reward(**rows)
    monkeypatch.setenv("CDR_STRONG", checkpoints["strong"])
    monkeypatch.setenv("CDR_WEAK", checkpoints["weak"])
    monkeypatch.setenv("CDR_REDUCTION", "mean")
    expected = CDRReward(checkpoints["strong"], checkpoints["weak"], reduction="mean")(**rows)
    logged = {}
    assert reward(**rows, log_metric=logged.__setitem__, trainer_state=None) == expected
    assert "cdr/gated" in logged
    assert pickle.loads(pickle.dumps(reward))(**rows) == expected
    monkeypatch.setenv("CDR_REDUCTION", "sum")
    assert reward(**rows) == expected


def test_name_and_kind(monkeypatch):
    assert trl_cdr.cdr_reward.__name__ == "cdr_reward"
    assert not isinstance(trl_cdr.cdr_reward, torch.nn.Module)
    monkeypatch.setenv("CDR_NAME", "safety")
    assert trl_cdr.cdr_reward.__name__ == "safety_reward"
