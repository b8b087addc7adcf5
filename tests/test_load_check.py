"""What the check at load lets pass, and what it does not: heads, windows, positions, types."""

import inspect
import re

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
from trl_cdr.scoring.forward import Decoder, Padded
from trl_cdr.scoring.load_check import TOLERANCE, short_windows
from trl_cdr.scoring.packing import Layout


@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("family", [name for name, (*_, way) in FAMILIES.items() if way == "padded"])
def test_the_check_refuses_what_the_config_would(family, monkeypatch):
    """Two nets: an architecture that the config does not betray is caught by its log-probabilities."""
    monkeypatch.setattr(module, "why_not_packed", lambda decoder: None)
    monkeypatch.setattr(module, "missing_input", lambda decoder: None)
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


TODAY = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Renamed(LlamaModel):
    """A backbone that takes keys and values by one name, and no other."""

    name = ""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **given):
        kept = given.pop(self.name, None)
        strange = [name for name in ("cache", "past_key_values") if given.pop(name, None) is not None]
        if strange:
            raise TypeError(f"forward() got an unexpected keyword argument {strange[0]!r}")
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, **inputs, **({} if kept is None else {TODAY: kept}))


class CacheAlone(Renamed):
    """As in a later transformers, in which the old name is gone."""

    name = "cache"


class OldNameAlone(Renamed):
    """As in code of a checkpoint's own, from before the new name."""

    name = "past_key_values"


class NoSignature(LlamaModel):
    """A backbone with a wrapped forward, as a kernel or a compiler leaves it: no name is in its signature."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.compat
@pytest.mark.parametrize("backbone", [CacheAlone, OldNameAlone, NoSignature], ids=lambda kind: kind.__name__)
def test_check_packs_whatever_the_cache_is_called(backbone):
    model = llama(V)
    model.model.__class__ = backbone
    lm = CausalLM(model, "strong", prefix_cache_tokens=100)
    assert lm.way() == ("packed", "")
    rows = random_rows(0, num_prefix=40)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows, constant=Layout(rows).prefix), token_budget=4096))


class NoCache(LlamaModel):
    """Accepts every argument and returns nothing to continue from."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)


class CacheRefused(Renamed):
    name = "neither"


class MaskIgnored(LlamaModel):
    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


class MaskRefused(LlamaModel):
    def forward(self, *args, attention_mask=None, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2, "a mask has two dimensions"
        return super().forward(*args, **kwargs)


class PositionsIgnored(LlamaModel):
    """Accepts position_ids and counts by itself."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class RotaryIgnored(LlamaModel):
    """Accepts position_ids, hands them to its mask, and rotates by places in the sequence."""

    def forward(self, *args, **kwargs):
        self.rotary_emb.forward = lambda x, position_ids: type(self.rotary_emb).forward(
            self.rotary_emb, x, torch.arange(x.shape[1], device=x.device)[None]
        )
        return super().forward(*args, **kwargs)


class PositionsRefused(LlamaModel):
    def forward(self, *args, **kwargs):
        if kwargs.get("position_ids") is not None:
            raise ImportError("rotary kernels are not installed")
        return super().forward(*args, **kwargs)


MISSING = {
    NoCache: r"takes no keys and values .*\(with cache: after 2 tokens the cache has keys and values of 0;",
    CacheRefused: r"takes no keys and values .*with past_key_values: TypeError: .*unexpected keyword argument 'past_ke",
    MaskIgnored: "^its forward ignores attention_mask$",
    MaskRefused: "^its forward fails with attention_mask: AssertionError: a mask has two dimensions",
    PositionsIgnored: "^its forward ignores position_ids$",
    RotaryIgnored: "^its forward ignores position_ids$",
    PositionsRefused: "^its forward fails with position_ids: ImportError: rotary kernels are not installed$",
}


@pytest.mark.compat
@pytest.mark.parametrize("backbone", MISSING, ids=lambda kind: kind.__name__)
def test_check_names_the_missing_input(backbone):
    model = llama(V)
    model.model.__class__ = backbone
    lm = CausalLM(model, "strong")
    way, reason = lm.way()
    assert way == "padded"
    assert re.search(MISSING[backbone], reason), reason
    rows = random_rows(0, num_prefix=40)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))


@pytest.mark.parametrize("broken", ["cache", "mask", "positions"])
def test_check_that_runs_out_of_memory_raises(broken, monkeypatch):
    """Memory is no property of the model: the next call checks again."""
    lm = CausalLM(llama(V), "strong")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as memory:
        if broken == "cache":
            memory.setattr("trl_cdr.scoring.kv_cache.DynamicCache.get_seq_length", fail)
        else:
            name = {"mask": "attention_mask", "positions": "position_ids"}[broken]
            hidden = Decoder.hidden
            memory.setattr(
                Decoder, "hidden", lambda self, ids, **kwargs: fail() if name in kwargs else hidden(self, ids, **kwargs)
            )
        with pytest.raises(torch.OutOfMemoryError):
            lm.way()
    assert lm.way() == ("packed", "")


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
