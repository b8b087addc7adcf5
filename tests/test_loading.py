"""A name or a path becomes a frozen model with all its weights, or an error that says why not."""

import contextlib
import os
from typing import ClassVar

import pytest
import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import (
    deepspeed_config,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from trl_cdr import CDRConfig, ConfigError, DensityRatioScorer, ModelError
from trl_cdr.scoring import loading as module
from trl_cdr.scoring.causal_lm import CausalLM


def test_loading_freezes_and_places(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong")
    parameters = list(lm.model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert {(p.device, p.dtype) for p in parameters} == {(PartialState().device, torch.float32)}
    assert not lm.model.training
    assert lm.num_positions == 256


def test_loading_takes_dtype_device_and_any_other_argument(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong", dtype="bfloat16", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    eager = CausalLM.load(checkpoints["strong"], "strong", init_kwargs={"attn_implementation": "eager"})
    assert eager.model.config._attn_implementation == "eager"


def test_loading_is_careful(checkpoints, monkeypatch):
    """Only safetensors, no remote code; and what loading draws does not shift the trainer's random numbers."""
    load, seen = module.AutoModelForCausalLM.from_pretrained, {}

    def spy(name, **kwargs):
        seen.update(kwargs)
        torch.rand(3)
        return load(name, **kwargs)

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", spy)
    state = torch.random.get_rng_state()
    CausalLM.load(checkpoints["strong"], "strong")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (seen["use_safetensors"], seen["trust_remote_code"]) == (True, False)


def test_the_old_name_of_dtype_counts(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong", init_kwargs={"torch_dtype": "bfloat16"})
    assert lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, ConfigError, "cdr_device is 'gpu', which torch does not know"),
        ({"init_kwargs": {"no_such_argument": 1}}, ModelError, "strong is .* can't be loaded"),
        ({"init_kwargs": {"attn_implementation": "no_such"}}, ModelError, "strong is .* can't be loaded"),
    ],
)
def test_what_can_not_be_loaded_so_says_so(checkpoints, options, error, message):
    with pytest.raises(error, match=message):
        CausalLM.load(checkpoints["strong"], "strong", **options)


def test_weights_that_the_checkpoint_lacks_are_an_error(tmp_path, strong):
    """A checkpoint without a head would load, with a random head and a warning that nobody reads."""
    strong.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"strong is .*lacks 1 weights \(lm_head.weight.*Use a checkpoint of a causal"):
        CausalLM.load(str(tmp_path), "strong")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match="weak is .*can't be loaded as a causal language model"):
        CausalLM.load(str(tmp_path / "nothing"), "weak")


class Zero3:
    """What `TrainingArguments` leaves where transformers looks for it, under DeepSpeed ZeRO-3."""

    config: ClassVar = {"zero_optimization": {"stage": 3}}

    def is_zero3(self):
        return True


@contextlib.contextmanager
def partitioned():
    """Under both of what makes `from_pretrained` leave weights to other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        config = Zero3()  # transformers keeps it by a weak reference
        set_hf_deepspeed_config(config)
        try:
            yield config
        finally:
            unset_hf_deepspeed_config()


@pytest.mark.compat
def test_the_pair_is_whole_where_the_policy_is_not(checkpoints, strong, monkeypatch):
    """And what loads the policy finds everything as it was, also after a load that failed."""
    load, seen = module.AutoModelForCausalLM.from_pretrained, []

    def spy(*args, **kwargs):
        seen.append((is_deepspeed_zero3_enabled(), "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ))
        return load(*args, **kwargs)

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", spy)
    with partitioned() as config:
        lm = CausalLM.load(checkpoints["strong"], "strong")
        assert torch.equal(lm.model.lm_head.weight, strong.lm_head.weight)
        assert seen == [(False, False)]
        for name in ("strong", "/nowhere"):
            with contextlib.suppress(ModelError):
                CausalLM.load(checkpoints.get(name, name), "strong")
            assert is_deepspeed_zero3_enabled()
            assert deepspeed_config() is config.config
            assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.mark.parametrize("kind", ["adapter", "asleep"])
def test_so_is_what_is_read_later(kind, checkpoints, tmp_path):
    """An adapter that is put on a base, and a pair that is loaded anew for each call."""
    options = dict(checkpoints)
    if kind == "adapter":
        pytest.importorskip("peft")
        from lora import save_adapter

        options["strong"] = save_adapter(tmp_path, checkpoints["weak"])
    else:
        options["offload"] = "disk"
    expected = DensityRatioScorer(**options).score(["hello"], ["world"])
    scorer = DensityRatioScorer(**options)
    with partitioned():
        assert scorer.score(["hello"], ["world"]) == expected
        assert scorer.score(["hello"], ["world"]) == expected


@pytest.mark.compat
@pytest.mark.parametrize("spelled", ['{"quantization_config": {"load_in_8bit": true}}', "an object"])
def test_quantisation_reaches_from_pretrained_as_its_config(checkpoints, monkeypatch, spelled):
    """From YAML, the command line and the environment it comes as a mapping, or as JSON."""
    wanted = BitsAndBytesConfig(load_in_8bit=True)
    kwargs = spelled if spelled != "an object" else {"quantization_config": wanted}
    config = CDRConfig.from_options(**checkpoints, model_init_kwargs=kwargs)
    load, seen = module.AutoModelForCausalLM.from_pretrained, []

    def spy(name, **kwargs):
        seen.append(kwargs.pop("quantization_config"))  # its library need not be here
        return load(name, **kwargs)

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", spy)
    DensityRatioScorer.from_config(config).load()
    assert len(seen) == 2
    assert all(isinstance(each, BitsAndBytesConfig) and each.load_in_8bit for each in seen)


@pytest.mark.parametrize("quantization", [{"quant_method": "no_such"}, {"bits": 4}])
def test_quantisation_that_nobody_knows(checkpoints, quantization):
    with pytest.raises(ModelError, match="strong is .* can't be loaded as a causal language model: .*quant"):
        CausalLM.load(checkpoints["strong"], "strong", init_kwargs={"quantization_config": quantization})
