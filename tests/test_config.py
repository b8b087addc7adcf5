"""Every option: names, defaults, types from YAML and from the command line, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from trl_cdr import CDRConfig, CDRReward, ConfigError
from trl_cdr.config import shareable_options

NAMES = {
    "cdr_strong": dataclasses.MISSING,
    "cdr_weak": dataclasses.MISSING,
    "cdr_strong_revision": None,
    "cdr_weak_revision": None,
    "cdr_strong_adapter": None,
    "cdr_weak_adapter": None,
    "cdr_strong_adapter_revision": None,
    "cdr_weak_adapter_revision": None,
    "cdr_share_policy": False,
    "cdr_dtype": "auto",
    "cdr_device": "auto",
    "cdr_model_init_kwargs": None,
    "cdr_reduction": "sum",
    "cdr_chat_template": None,
    "cdr_chat_template_kwargs": None,
    "cdr_string_prompts": "auto",
    "cdr_date": None,
    "cdr_policy_tokenizer": None,
    "cdr_add_special_tokens": "auto",
    "cdr_max_length": None,
    "cdr_token_budget": 8192,
    "cdr_gate": "surprise",
    "cdr_typicality": None,
    "cdr_on_unscorable": "auto",
    "cdr_on_gaming": "warn",
    "cdr_name": "cdr",
    "cdr_prefix_cache_tokens": 8192,
    "cdr_criteria": None,
    "cdr_domain": None,
    "cdr_router": None,
    "cdr_num_exemplars": 2,
    "cdr_exemplar_style": "inline",
    "cdr_offload": "none",
    "cdr_replicas": "rank",
    "cdr_seed": 0,
}


def test_the_public_names_and_defaults():
    assert {field.name: field.default for field in dataclasses.fields(CDRConfig)} == NAMES
    assert all(field.metadata["help"] for field in dataclasses.fields(CDRConfig))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cdr_strong", 3, r"cdr_strong is 3 \(int\). It takes str"),
        ("cdr_strong", " ", "cdr_strong is empty"),
        ("cdr_strong_adapter", " ", "cdr_strong_adapter is empty"),
        ("cdr_share_policy", "yes", r"cdr_share_policy is 'yes' \(str\). It takes bool"),
        ("cdr_share_policy", 1, r"cdr_share_policy is 1 \(int\). It takes bool"),
        ("cdr_token_budget", True, r"cdr_token_budget is True \(bool\). It takes int"),
        ("cdr_reduction", "max", "cdr_reduction is 'max'. Use one of: sum, mean"),
        ("cdr_reduction", None, "cdr_reduction is None"),
        ("cdr_dtype", "fp16", "cdr_dtype is 'fp16'. Use one of: auto, float32, bfloat16, float16"),
        ("cdr_max_length", "512", r"cdr_max_length is '512' \(str\). It takes int or None"),
        ("cdr_max_length", 1, "cdr_max_length is 1"),
        ("cdr_token_budget", 0, "cdr_token_budget is 0"),
        ("cdr_prefix_cache_tokens", -1, "cdr_prefix_cache_tokens is -1"),
        ("cdr_gate", "off", "cdr_gate is 'off'. Use one of: surprise, typicality, none"),
        ("cdr_gate", None, "cdr_gate is None. Use one of"),
        ("cdr_typicality", 0, "cdr_typicality is 0: it counts standard deviations"),
        ("cdr_typicality", float("nan"), "cdr_typicality is nan"),
        ("cdr_typicality", "inf", r"cdr_typicality is 'inf' \(str\). It takes float or None"),
        ("cdr_num_exemplars", -1, "cdr_num_exemplars is -1"),
        ("cdr_exemplar_style", "chat", "Use one of: inline, turns"),
        ("cdr_domain", "safety", "cdr_domain is 'safety' and cdr_criteria is missing"),
        ("cdr_router", "likelihood", "cdr_router is 'likelihood' and cdr_criteria is missing"),
        ("cdr_token_budget", 8.5, "cdr_token_budget is 8.5"),
        ("cdr_seed", True, "cdr_seed is True"),
        ("cdr_model_init_kwargs", "{'a': 1}", "no JSON"),
        ("cdr_chat_template_kwargs", "[1]", "must spell a JSON object"),
        ("cdr_chat_template_kwargs", [1], r"cdr_chat_template_kwargs is \[1\] \(list\). It takes dict or str or None"),
        ("cdr_chat_template", "no/such/file.jinja", "no such file exists"),
        (
            "cdr_chat_template_kwargs",
            {"tokenize": True},
            "has 'tokenize', which is not the template's to read: rendering sets it itself. Leave it out",
        ),
        ("cdr_name", "my reward", "cdr_name is 'my reward'"),
        ("cdr_on_unscorable", "zero", "Use one of: auto, floor, none, raise"),
        ("cdr_add_special_tokens", "yes", "Use one of: auto, true, false"),
    ],
)
def test_what_is_refused_names_the_option_the_value_and_the_rule(name, value, message):
    with pytest.raises(ConfigError, match=message):
        CDRConfig(**{"cdr_strong": "a", "cdr_weak": "b", name: value})


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_what_the_policy_trains_on_does_not_sleep(offload):
    with pytest.raises(ConfigError, match=f"cdr_share_policy is set and cdr_offload is '{offload}'.*Leave out one"):
        CDRConfig("a", "b", cdr_share_policy=True, cdr_offload=offload)
    assert CDRConfig("a", "b", cdr_share_policy=False, cdr_offload=offload).cdr_offload == offload


SERVERS = {"cdr_strong": "vllm://a:1/m", "cdr_weak": "vllm+https://b/n", "cdr_gate": "none"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cdr_gate": "typicality"}, r"cdr_gate is 'typicality' \(where it is left out, too\).*Write cdr_gate='none'"),
        ({"cdr_gate": "surprise"}, "cdr_gate is 'surprise' .*load strong here, beside which weak may stay"),
        ({"cdr_strong_revision": "v2"}, "cdr_strong_revision is 'v2', and cdr_strong is on a server"),
        ({"cdr_weak_adapter": "c"}, r"cdr_weak_adapter is 'c', and cdr_weak is on a server.*--lora-modules"),
        ({"cdr_share_policy": True}, "cdr_share_policy is set, and cdr_strong is on a server"),
        ({"cdr_dtype": "bfloat16"}, r"cdr_dtype is 'bfloat16', and strong and weak are on servers.*\(--dtype\)"),
        ({"cdr_device": "cpu"}, "cdr_device is 'cpu', and strong and weak are on servers"),
        ({"cdr_offload": "cpu"}, "cdr_offload is 'cpu', and strong and weak are on servers"),
        (
            {"cdr_model_init_kwargs": {"attn_implementation": "eager"}},
            "cdr_model_init_kwargs has 'attn_implementation'",
        ),
    ],
)
def test_what_a_server_can_not_be_asked(options, message):
    with pytest.raises(ConfigError, match=message):
        CDRConfig(**SERVERS | options)


def test_a_pair_of_which_a_server_has_one():
    """The weak one is asked for no distribution, and the strong one's weights are here."""
    weak = {"cdr_strong": "a", "cdr_weak": "vllm://b:1/n"}
    for gate in ("typicality", "surprise", "none"):
        config = CDRConfig(**weak, cdr_gate=gate, cdr_offload="cpu", cdr_dtype="bfloat16", cdr_strong_adapter="c")
        assert config.served == ["weak"]
    assert CDRConfig(**SERVERS, cdr_model_init_kwargs={"token": "x", "cache_dir": "y"}).served == ["strong", "weak"]
    assert CDRConfig("a", "b").served == []


def test_the_trainers_type_is_not_that_of_servers():
    args = SimpleNamespace(seed=0, bf16=True, device=torch.device("cuda"))
    assert CDRConfig(**SERVERS).options(args)["dtype"] == "auto"
    assert CDRConfig(**SERVERS | {"cdr_strong": "a"}).options(args)["dtype"] == "bfloat16"


def test_what_the_policy_trains_on_is_in_every_process():
    with pytest.raises(ConfigError, match="cdr_share_policy is set and cdr_replicas is 'node'.*Leave out one"):
        CDRConfig("a", "b", cdr_share_policy=True, cdr_replicas="node")
    assert CDRConfig("a", "b", cdr_replicas="node").cdr_replicas == "node"
    with pytest.raises(ConfigError, match="cdr_replicas is 'machine'. Use one of: rank, node"):
        CDRConfig("a", "b", cdr_replicas="machine")


def test_a_bare_boolean_from_yaml():
    assert CDRConfig("a", "b", cdr_add_special_tokens=True).cdr_add_special_tokens == "true"
    assert CDRConfig("a", "b", cdr_add_special_tokens=False).cdr_add_special_tokens == "false"
    assert CDRConfig("a", "b", cdr_on_gaming=False).cdr_on_gaming == "off"  # YAML 1.1 reads a bare off as one
    with pytest.raises(ConfigError, match="cdr_on_gaming is True. Use one of: warn, stop, off"):
        CDRConfig("a", "b", cdr_on_gaming=True)


@pytest.mark.parametrize(
    ("bound", "gate", "advice"),
    [
        (float("inf"), "none", "In place of cdr_typicality=inf write cdr_gate='none'."),
        (2.0, "typicality", "In place of cdr_typicality=2.0 write cdr_gate='typicality', whose bound is 1.5."),
        (2, "typicality", "In place of cdr_typicality=2 write cdr_gate='typicality'"),
    ],
)
def test_typicality_is_deprecated_and_says_what_to_write(bound, gate, advice):
    with pytest.warns(FutureWarning, match=advice) as caught:
        config = CDRConfig("a", "b", cdr_typicality=bound)
    assert [warning.filename for warning in caught] == [__file__]
    assert config.cdr_gate == gate
    assert config.typicality_bound == (2 if gate == "typicality" else 1.5)
    if gate == "none":  # a copy has nothing more to say, and says the same
        assert CDRConfig.from_options(**config.options()) == config
    with pytest.warns(FutureWarning):
        assert CDRReward("a", "b", typicality=bound).config == config
    with pytest.warns(FutureWarning):
        assert CDRConfig("a", "b", cdr_gate=gate, cdr_typicality=bound) == config
    other = "typicality" if gate == "none" else "none"
    with pytest.raises(ConfigError, match=f"cdr_gate is '{other}', and cdr_typicality={bound} asks for '{gate}'"):
        CDRConfig("a", "b", cdr_gate=other, cdr_typicality=bound)


def test_the_gate_from_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("cdr_strong: a\ncdr_weak: b\ncdr_gate: none\n")  # a string: YAML's nothing is null
    *_, config = parse(*COMMON, "--config", str(path))
    assert config.cdr_gate == "none"
    *_, config = parse(*COMMON, "--config", str(path), "--cdr_gate", "surprise")
    assert config.cdr_gate == "surprise"


def test_keyword_arguments_go_without_the_prefix():
    assert CDRReward("a", "b", reduction="mean").config.cdr_reduction == "mean"
    with pytest.raises(ConfigError, match="'reduktion' is no option. Options: strong, weak"):
        CDRReward("a", "b", reduktion="mean")
    with pytest.raises(ConfigError, match="'cdr_reduction' is no option. Leave out the prefix cdr_"):
        CDRReward("a", "b", cdr_reduction="mean")


def parse(*arguments):
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, CDRConfig))
    # TRL's own deprecation on its way to transformers 6; drop when GRPOConfig stops setting gradient_checkpointing
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return parser.parse_args_and_config(arguments)


COMMON = ("--dataset_name", "none", "--output_dir", "out", "--use_cpu", "--bf16", "False", "--seed", "7")


def test_parses_beside_a_trainers_config_from_the_command_line():
    *_, args, _, config = parse(
        *COMMON, "--cdr_strong", "a", "--cdr_weak", "b", "--cdr_chat_template_kwargs", '{"enable_thinking": false}'
    )
    assert config.cdr_chat_template_kwargs == {"enable_thinking": False}
    reward = CDRReward.from_config(config, args)
    assert reward.config == dataclasses.replace(config, cdr_seed=7)
    assert CDRReward.from_config(dataclasses.replace(config, cdr_seed=3), args).config.cdr_seed == 3
    assert CDRReward.from_config(config).config == config


def test_the_type_follows_the_trainers_where_the_pair_shares_its_device():
    def chosen(device="cuda", bf16=True, **options):
        args = SimpleNamespace(seed=0, bf16=bf16, device=torch.device(device))
        return CDRConfig("a", "b", **options).options(args)["dtype"]

    assert chosen() == chosen(cdr_device="cuda:1") == "bfloat16"
    assert chosen(bf16=False) == chosen(device="cpu") == chosen(cdr_device="cpu") == "auto"
    assert chosen(cdr_dtype="float32") == "float32"
    *_, args, _, config = parse(*COMMON[:-4], "--bf16", "True", "--cdr_strong", "a", "--cdr_weak", "b")
    assert args.bf16
    assert config.options(args)["dtype"] == "auto"


def test_parses_beside_a_trainers_config_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    options = {"cdr_strong": "a", "cdr_weak": "b", "cdr_max_length": 64, "cdr_model_init_kwargs": {"x": 1}}
    path.write_text(yaml.safe_dump(options))
    *_, config = parse(*COMMON, "--config", str(path))
    assert (config.cdr_max_length, config.cdr_model_init_kwargs) == (64, {"x": 1})
    path.write_text(yaml.safe_dump({**options, "cdr_max_length": 64.5}))  # the parser lets it through
    with pytest.raises(ConfigError, match="cdr_max_length is 64.5"):
        parse(*COMMON, "--config", str(path))


def test_what_may_be_stored_of_a_config():
    """No secret, nothing of one machine, and JSON as the standard has it."""
    local = {"token": "hf_secret", "cache_dir": "/home/me", "local_files_only": True}
    shared = {"dtype": torch.bfloat16, "sizes": (1, float("nan")), "of": {1: None}}
    config = CDRConfig("a", "b", cdr_model_init_kwargs=local | shared)
    config.cdr_typicality = float("inf")  # as earlier versions kept it
    stored = shareable_options(config)
    assert stored == dataclasses.asdict(config) | {
        "cdr_typicality": "inf",
        "cdr_model_init_kwargs": {"dtype": "torch.bfloat16", "sizes": [1, "nan"], "of": {"1": None}},
    }
    assert json.loads(json.dumps(stored, allow_nan=False)) == stored == shareable_options(stored)
    assert config.cdr_model_init_kwargs == local | shared
    assert shareable_options(CDRConfig("a", "b", cdr_model_init_kwargs=local)) == shareable_options(CDRConfig("a", "b"))
    assert shareable_options({"other": 1}) == {"other": 1}


def test_the_config_needs_no_torch():
    code = "import sys, trl_cdr; trl_cdr.CDRConfig('a', 'b'); assert not {'torch', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
