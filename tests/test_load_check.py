"""What the check at load lets pass, and what it does not: heads, windows, positions, types."""

import inspect
import re

import pytest
import torch
from families import ALL_FAMILIES, V, build_family, random_rows
from oracle import assert_naive
from tiny import llama, scarce
from transformers import BertConfig, BertLMHeadModel, Gemma3TextConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from trl_cdr import ModelError
from trl_cdr.scoring import causal_lm as module
from trl_cdr.scoring import packed
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.forward import Decoder, OwnLogits, Padded
from trl_cdr.scoring.load_check import TOLERANCE, LoadCheck, short_windows
from trl_cdr.scoring.logps import token_logps
from trl_cdr.scoring.packing import Layout


@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("family", [name for name, (*_, way) in ALL_FAMILIES.items() if way == "padded"])
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


# Sharp enough that routers often rate two experts nearly equal.
MANY_EXPERTS = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 4}
EXPERTS = ["Qwen3-MoE", "Mixtral", "OLMoE"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", EXPERTS)
def test_check_allows_flipped_experts(family, dtype):
    model = build_family(family, **MANY_EXPERTS).to(dtype)
    for seed in range(4):
        assert CausalLM(model, "strong", seed=seed).way() == ("packed", "")


class Counted(Decoder):
    """Ignores the positions of a pack and counts tokens in the sequence."""

    def hidden(self, input_ids, *, cache=None, position_ids=None, **kwargs):
        if position_ids is not None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + input_ids.shape[1], device=self.device)[None]
            kwargs["position_ids"] = position_ids
        return super().hidden(input_ids, cache=cache, **kwargs)


def see_branches(pack, *, num_prefix, window=None, device=None):
    """As `visible`, and branches see each other."""
    num_ids = len(pack.ids)
    return torch.ones(num_ids, num_prefix + num_ids, dtype=torch.bool, device=device).tril(num_prefix)


@pytest.mark.parametrize("broken", ["positions", "branches"])
@pytest.mark.parametrize("family", EXPERTS)
def test_check_refuses_broken_packs_of_experts(family, broken, monkeypatch):
    if broken == "positions":
        monkeypatch.setattr(module, "Decoder", Counted)
        monkeypatch.setattr(module, "missing_input", lambda decoder: None)
    else:
        monkeypatch.setattr(packed, "visible", see_branches)
    model = build_family(family, **MANY_EXPERTS).to(torch.bfloat16)
    for seed in range(4):
        way, reason = CausalLM(model, "strong", seed=seed).way()
        assert way == "padded"
        assert re.search(
            r"packed log-probabilities differ from its own by up to .* nats \(at \d+ of \d+ tokens\)", reason
        )


class Altered(Padded):
    """Changes the log-probabilities of some tokens of each row."""

    every, change = 1, 2.0

    def run(self, layout, job, reduce=token_logps):
        logps = super().run(layout, job, reduce)
        logps[:: self.every] += self.change
        return logps


@pytest.mark.parametrize(
    ("family", "dtype", "every", "change", "is_refused"),
    [
        ("Mixtral", torch.bfloat16, 1000, 2.0, False),
        ("Mixtral", torch.bfloat16, 1000, float("nan"), True),
        ("Mixtral", torch.bfloat16, 2, 2.0, True),
        ("Mixtral", torch.float32, 1000, 2.0, True),
        ("Llama", torch.bfloat16, 1000, 2.0, True),
    ],
)
def test_differs_allows_few_tokens_of_experts(family, dtype, every, change, is_refused):
    """One token of each probe of several rows, or every second one."""
    model = build_family(family).to(dtype)
    decoder = Decoder(model, model.config)
    with torch.inference_mode():
        check = LoadCheck(
            OwnLogits(decoder), dtype=dtype, num_ids=V, num_positions=256, seed=0, has_experts=decoder.has_experts
        )
        way = Altered(decoder)
        way.every, way.change = every, change
        check._probes, check._expected = check._probes[:1], check._expected[:1]  # the rows of 22 tokens
        assert (check.differs(way, "padded") is not None) == is_refused


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_has_experts_of_families(family):
    model = build_family(family)
    moe = {"Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "OLMoE", "Llama 4"}
    assert Decoder(model, model.config).has_experts == (family in moe)


class SeesAll(LlamaModel):
    """A mask of its own, by which each token sees all."""

    def forward(self, input_ids, **kwargs):
        kwargs["attention_mask"] = torch.zeros(1, 1, input_ids.shape[1], input_ids.shape[1], dtype=self.dtype)
        return super().forward(input_ids, **kwargs)


class SeesBlock(LlamaModel):
    """Tokens see each other in blocks of 4, as in block diffusion."""

    def forward(self, input_ids, **kwargs):
        blocks = torch.arange(input_ids.shape[1]) // 4
        hidden = blocks[:, None] < blocks[None, :]
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, torch.finfo(self.dtype).min)
        return super().forward(input_ids, **{**kwargs, "attention_mask": mask[None, None]})


class SeesNext(LlamaModel):
    """Each token's embedding holds some of the next one's."""

    def forward(self, input_ids, **kwargs):
        embeds = self.embed_tokens(input_ids)
        return super().forward(**{**kwargs, "inputs_embeds": embeds + embeds.roll(-1, dims=1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backbone", [SeesAll, SeesBlock, SeesNext], ids=lambda kind: kind.__name__)
def test_check_later_tokens_seen_raises(backbone, dtype):
    model = llama(V).to(dtype)
    model.model.__class__ = backbone
    message = r"weak \(.*\) is a LlamaForCausalLM whose log-prob.*Each token must depend on earlier tokens only. Use a"
    lm = CausalLM(model, "weak")
    for _ in range(2):  # an error is no verdict: the next call checks again
        with pytest.raises(ModelError, match=message):
            lm.way()


@pytest.mark.parametrize("family", EXPERTS)
def test_check_experts_seeing_later_raises(family):
    model = build_family(family, **MANY_EXPERTS).to(torch.bfloat16)

    def see_all(module, args, kwargs):
        length = kwargs["input_ids"].shape[1]
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, length, length, dtype=torch.bfloat16)}

    model.model.register_forward_pre_hook(see_all, with_kwargs=True)
    with pytest.raises(ModelError, match=r"\(at \d of 7 tokens\) if later tokens change"):
        CausalLM(model, "strong").way()


@pytest.mark.parametrize("positions", [8, 256])
def test_check_encoder_raises(positions):
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=V, max_position_embeddings=positions, initializer_range=0.3, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertLMHeadModel(config).eval()
    with pytest.raises(ModelError, match=r"strong \(.*\) is a BertLMHeadModel .* depend on earlier.*is_decoder=True"):
        CausalLM(model, "strong").way()
    config.is_decoder = True
    causal = BertLMHeadModel(config).eval()
    causal.load_state_dict(model.state_dict())
    assert CausalLM(causal, "strong").way()[0] in ("padded", "row by row")


def test_check_bidirectional_gemma_raises():
    lm = CausalLM(build_family("Gemma 3", use_bidirectional_attention=True), "strong")
    if hasattr(Gemma3TextConfig(), "use_bidirectional_attention"):
        with pytest.raises(ModelError, match=r"Gemma3ForCausalLM .*use_bidirectional_attention=False"):
            lm.way()
    else:  # an older transformers, in which Gemma 3 is always causal
        assert lm.way() == ("packed", "")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_check_accepts_families_in_bfloat16(family):
    model = build_family(family).to(torch.bfloat16)
    for seed in range(2):
        CausalLM(model, "strong", seed=seed).way()


def test_check_accepts_broken_embeddings():
    """NaN of a later token reaches earlier ones through a weight of 0."""
    model = llama(V)
    with torch.no_grad():
        model.model.embed_tokens.weight[::2] = float("nan")
    assert CausalLM(model, "strong").way()[0] != ""
