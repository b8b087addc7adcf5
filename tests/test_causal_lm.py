"""One frozen model: heads that scale or cap, memory that runs out, checkpoints that are not what they seem."""

import logging

import pytest
import torch
from accelerate import PartialState
from oracle import completion_logps
from tiny import llama
from transformers import (
    BertConfig,
    BertModel,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_cdr import ConfigError, ModelError
from trl_cdr.scoring import causal_lm as module
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.encoding import Row

V = 61
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OOM = "CUDA out of memory. Tried to allocate 1 GiB."
ROWS = [Row((1, 2, 3), (4, 5)), Row((9,), (8, 7, 6, 5, 4)), Row((3, 1, 4, 1, 5, 9, 2, 6), (5,))]


def build(model_class, config_class, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config_class(**{**SMALL, **config})).eval()


FAMILIES = {
    "soft-capped (Gemma 2)": lambda: build(
        Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0
    ),
    "divided (Granite)": lambda: build(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0),
    "multiplied (Cohere)": lambda: build(CohereForCausalLM, CohereConfig, logit_scale=0.3),
    "multiplied (Cohere 2)": lambda: build(Cohere2ForCausalLM, Cohere2Config, logit_scale=0.3),
    "absolute positions (GPT-2)": lambda: build(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4),
    "plain (Llama)": lambda: llama(V),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_own_log_probabilities(family, caplog):
    model = FAMILIES[family]()
    lm = CausalLM(model, "strong")
    results = lm.per_token_logps(ROWS, token_budget=64)
    for row, logps in zip(ROWS, results, strict=True):
        expected = completion_logps(model, row.prompt_ids, row.completion_ids)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-4)
    assert lm._can_gather
    assert not caplog.records


class Tripled(LlamaForCausalLM):
    """An architecture that does to its logits what no config field tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output


def test_an_unknown_head_takes_the_slower_path_and_says_so_once(caplog):
    model = llama(V)
    model.__class__ = Tripled
    lm = CausalLM(model, "weak")
    with caplog.at_level(logging.WARNING):
        results = lm.per_token_logps(ROWS, token_budget=64)
        lm.per_token_logps(ROWS, token_budget=64)
    for row, logps in zip(ROWS, results, strict=True):
        expected = completion_logps(model, row.prompt_ids, row.completion_ids)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "weak" in caplog.text
    assert "row by row" in caplog.text


def test_the_head_runs_only_where_a_completion_token_is_predicted():
    model = llama(V)
    lm = CausalLM(model, "strong")
    lm.per_token_logps(ROWS, token_budget=64)  # the check at load is over
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    lm.per_token_logps(ROWS, token_budget=64)
    assert shapes == [(sum(len(row.completion_ids) for row in ROWS), V)]


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    lm = CausalLM(llama(V), "strong")
    whole = lm.per_token_logps(ROWS * 3, token_budget=1000)
    sizes, run = [], lm._run

    def scarce(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError(OOM)
        return run(rows)

    monkeypatch.setattr(lm, "_run", scarce)
    for row, expected in zip(lm.per_token_logps(ROWS * 3, token_budget=1000), whole, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
    assert sizes[:2] == [9, 4]
    assert sum(size for size in sizes if size <= 2) == 9  # no row twice


def test_a_single_row_that_does_not_fit_says_what_to_change(monkeypatch):
    lm = CausalLM(llama(V), "weak")

    def never(rows):
        raise torch.OutOfMemoryError(OOM)

    lm.per_token_logps(ROWS, token_budget=64)
    monkeypatch.setattr(lm, "_run", never)
    with pytest.raises(ModelError, match=r"weak ran out of memory on a single row of \d+ tokens.*cdr_max_length"):
        lm.per_token_logps(ROWS, token_budget=64)


def test_a_check_that_runs_out_of_memory_is_no_verdict_on_the_model(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    with monkeypatch.context() as scarce:
        scarce.setattr(lm, "_run_gathered", lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError(OOM)))
        with pytest.raises(torch.OutOfMemoryError):
            lm.per_token_logps(ROWS, token_budget=64)
    lm.per_token_logps(ROWS, token_budget=64)
    assert lm._can_gather


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    lm.per_token_logps(ROWS, token_budget=64)

    def broken(rows):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(lm, "_run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        lm.per_token_logps(ROWS, token_budget=64)


def test_no_rows():
    assert CausalLM(llama(V), "strong").per_token_logps([], token_budget=1) == []


def test_half_precision_stays_close():
    model = llama(V).to(torch.bfloat16)
    lm = CausalLM(model, "strong")
    results = lm.per_token_logps(ROWS, token_budget=64)
    assert lm._can_gather
    for row, logps in zip(ROWS, results, strict=True):
        expected = completion_logps(model, row.prompt_ids, row.completion_ids)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=0.1)


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


def test_encoder_decoders_are_refused(tmp_path):
    config = T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for make in (lambda: CausalLM(model, "strong"), lambda: CausalLM.load(str(tmp_path), "strong")):
        with pytest.raises(ModelError, match="strong is a t5, an encoder-decoder.*Use a decoder-only model"):
            make()


def test_models_without_a_head_are_refused():
    config = BertConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="weak is a BertModel, which has no language-modelling head"):
        CausalLM(BertModel(config), "weak")
    with pytest.raises(ModelError, match="strong is a Linear, which is no transformers model"):
        CausalLM(torch.nn.Linear(2, 2), "strong")


def test_tolerances_cover_the_types_that_can_be_asked_for():
    assert set(module._TOLERANCE) >= {torch.float32, torch.bfloat16, torch.float16}
