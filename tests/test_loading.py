"""A name or a path becomes a frozen model with all its weights, or an error that says why not."""

import pytest
import torch
from accelerate import PartialState

from trl_cdr import ConfigError, ModelError
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


def test_loading_where_weights_would_be_empty_is_refused(checkpoints, monkeypatch):
    """FSDP's RAM-efficient loading leaves every local rank but the first with uninitialised weights."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    CausalLM.load(checkpoints["strong"], "strong")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ModelError, match="weak can't be loaded under FSDP's RAM-efficient loading.*: false"):
        CausalLM.load(checkpoints["weak"], "weak")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ModelError, match="weak can't be loaded under DeepSpeed ZeRO-3.*use ZeRO-2"):
        CausalLM.load(checkpoints["weak"], "weak")
