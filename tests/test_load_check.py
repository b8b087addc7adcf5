"""What the check at load lets pass, and what it does not: heads, windows, positions, types."""

import pytest
import torch
from families import FAMILIES, V, build_family, random_rows
from oracle import assert_naive
from tiny import llama, scarce
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from trl_cdr import ModelError
from trl_cdr.scoring import causal_lm as module
from trl_cdr.scoring import packed
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.forward import Padded
from trl_cdr.scoring.load_check import TOLERANCE, short_windows
from trl_cdr.scoring.packing import Layout


@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("family", [name for name, (*_, way) in FAMILIES.items() if way == "padded"])
def test_the_check_refuses_what_the_config_would(family, monkeypatch):
    """Two nets: an architecture that the config does not betray is caught by its log-probabilities."""
    monkeypatch.setattr(module, "why_not_packed", lambda decoder: None)
    monkeypatch.setattr(module, "ignores_positions", lambda decoder: False)
    way, reason = CausalLM(build_family(family), "strong").way()
    assert way == "padded"
    assert "differ" in reason or "fails" in reason


def test_a_check_that_runs_out_of_memory_is_no_verdict_on_the_model(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    with monkeypatch.context() as memory:
        scarce(memory, Padded, most=0)
        with pytest.raises(torch.OutOfMemoryError):
            lm.way()
    assert lm.way() == ("packed", "")


def test_a_model_of_few_positions_is_checked_with_short_rows():
    lm = CausalLM(llama(V, positions=8), "strong")
    assert lm.way() == ("packed", "")


def test_tolerances_cover_the_types_that_can_be_asked_for():
    assert set(TOLERANCE) >= {torch.float32, torch.bfloat16, torch.float16}


class Scaled(LlamaForCausalLM):
    """An architecture that does to its logits what no config field tells."""

    factor = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.003), (torch.float16, 1.2), (torch.bfloat16, 1.5)], ids=str
)
def test_what_is_off_by_more_than_the_types_rounding_is_refused(dtype, factor):
    model = llama(V).to(dtype)
    assert CausalLM(model, "strong").way() == ("packed", "")
    model.__class__, model.factor = Scaled, factor
    way, reason = CausalLM(model, "strong").way()
    assert way == "row by row"
    assert "differ from its own" in reason


def test_an_architecture_that_was_not_compared_is_padded(monkeypatch):
    monkeypatch.setattr(packed, "VERIFIED", frozenset())
    way, reason = CausalLM(llama(V), "strong").way()
    assert way == "padded"
    assert "architecture (llama) has not been compared" in reason


class Unplaced(LlamaModel):
    """A backbone that takes position_ids and counts for itself."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_backbone_that_ignores_positions_is_padded():
    model = llama(V)
    model.model.__class__ = Unplaced
    lm = CausalLM(model, "strong")
    assert lm.way() == ("padded", "its forward ignores position_ids")
    rows = random_rows(0, num_prefix=40)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))


@pytest.mark.parametrize("family", ["Mistral, sliding window", "Gemma 2", "Cohere 2"])
def test_windows_longer_than_the_probe_are_exercised(family, monkeypatch):
    model = build_family(family)
    model.config.sliding_window = 200
    assert CausalLM(model, "strong").way() == ("packed", "")
    assert model.config.sliding_window == 200
    # A pack that overlooks the window: without a short one the check would let it pass.
    windows = packed.attention_windows
    monkeypatch.setattr(packed, "attention_windows", lambda config: dict.fromkeys(windows(config)))
    way, reason = CausalLM(model, "strong").way()
    assert way == "padded"
    assert "differ from its own" in reason


def test_a_window_is_put_back_after_an_error():
    config = build_family("Gemma 2").config
    window = config.sliding_window = 200
    with pytest.raises(ZeroDivisionError), short_windows(config):
        raise ZeroDivisionError
    assert config.sliding_window == window


@pytest.mark.parametrize("part", ["lm_head", "model.norm"])
def test_a_model_of_several_types_that_can_not_run_says_so(part):
    model = llama(V).to(torch.bfloat16)
    model.get_submodule(part).float()
    with pytest.raises(ModelError, match=r"weak \(.*\) fails on a short row.*several types \(.*bfloat16, 1 float32\)"):
        CausalLM(model, "weak").way()


def test_a_model_of_several_types_that_can_run_does():
    """Some architectures keep parts of theirs in float32, and convert."""
    model = llama(V).to(torch.bfloat16)
    norm = model.model.norm.float()
    norm.register_forward_hook(lambda module, args, output: output.to(torch.bfloat16))
    assert CausalLM(model, "strong").way() == ("packed", "")


@pytest.mark.parametrize("seed", range(4))
def test_large_logits_are_no_verdict_on_a_model_in_half_precision(seed):
    """A step of bfloat16 is half a nat there, whichever way it is rounded."""
    model = llama(V).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(16)
    assert CausalLM(model, "strong", seed=seed).way() == ("packed", "")
