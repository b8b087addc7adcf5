"""What a pair takes, by hand and as it is: counted on configs, measured on models."""

import pytest
import torch
from families import build_family
from tiny import llama
from torch import nn
from transformers import GPT2Config, LlamaConfig, ViTConfig

from trl_cdr import ModelError
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.memory import GB, advise, footprint, holdings, measured_bytes, weight_bytes

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
}


def count(config, *, dtype=torch.bfloat16, device="cuda", token_budget=8192, prefix_tokens=0):
    return footprint(
        config,
        "strong",
        dtype=dtype,
        device=torch.device(device),
        token_budget=token_budget,
        prefix_tokens=prefix_tokens,
    )


def test_a_pair_of_8b_by_hand():
    model = count(LlamaConfig(**LLAMA_8B), prefix_tokens=1024)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    norms = 2 * 32 * 4096 + 4096
    assert model.parameters == 2 * 128_256 * 4096 + 32 * layer + norms == 8_030_261_248
    assert model.linear == 32 * layer
    assert (model.rows, model.columns) == (32 * (4096 * 3 + 1024 * 2 + 14_336 * 2), 32 * (4096 * 6 + 14_336))
    assert model.prefix_bytes == 1024 * 2 * 32 * 8 * 128 * 2  # keys and values: layers x heads x size, bfloat16
    ways = {way.option: way for way in holdings(model, model)}
    weights = {option: round((way.weight_bytes or 0) / GB, 2) for option, way in ways.items()}
    assert weights == {
        "the default": 32.12,
        "cdr_strong_adapter": 16.14,  # 41.9 million numbers of rank 16: 0.08
        "cdr_offload=cpu": 16.06,
        "cdr_offload=disk": 16.06,
        "quantization_config: load_in_8bit": 18.17,  # 6.98 billion a byte each, the rest two
        "quantization_config: load_in_4bit": 12.06,  # half a byte, and a float32 for each 64
        "cdr_share_policy": 0.08,
    }
    assert {option: way.host_bytes for option, way in ways.items() if way.host_bytes} == {
        "cdr_offload=cpu": 2 * 8_030_261_248 * 2
    }
    kept = ways["the default"].extra_bytes - ways["cdr_offload=cpu"].extra_bytes
    assert kept == model.prefix_bytes  # the other one's are not on the device
    assert 1 < model.work_bytes / GB < 4


def test_a_tied_head_counts_once():
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tied, untied = (count(LlamaConfig(**sizes, tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.parameters - tied.parameters == 1000 * 64
    assert tied.linear == untied.linear


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma 2", "Qwen2-MoE", "Mamba"])
@pytest.mark.compat
def test_what_is_counted_is_what_is_loaded(family):
    model = build_family(family)
    for dtype in (torch.float32, torch.bfloat16):
        counted = count(model.config, dtype=dtype)
        assert counted.weight_bytes == sum(p.numel() for p in model.parameters()) * dtype.itemsize


def test_counting_takes_no_memory_and_draws_nothing():
    state = torch.random.get_rng_state()
    huge = count(LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 200}))
    assert huge.weight_bytes > 80 * GB
    assert torch.equal(torch.random.get_rng_state(), state)


def test_linear_layers_of_gpt2_are_counted_too():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100)
    assert count(config).linear == 2 * 12 * 64 * 64


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Mamba"])
def test_work_is_estimated_before_loading_as_it_is_afterwards(family):
    model = build_family(family)
    lm = CausalLM(model, "strong", prefix_cache_tokens=100)
    told = lm.describe(token_budget=512)
    counted = count(model.config, dtype=torch.float32, device="cpu", token_budget=512, prefix_tokens=100)
    assert counted.work_bytes == told["work_mb"] * 2**20
    assert counted.prefix_bytes == told["prefix_mb"] * 2**20
    assert counted.weight_bytes <= told["weights_mb"] * 2**20 < counted.weight_bytes + 1000  # and its buffers


def test_models_that_differ_in_shape_are_no_one_base():
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128}
    strong, weak = (count(LlamaConfig(**sizes, num_hidden_layers=layers)) for layers in (2, 1))
    by_option = {way.option: way.weight_bytes for way in holdings(strong, weak)}
    assert by_option["cdr_strong_adapter"] is None
    assert by_option["cdr_share_policy"] is None
    assert by_option["cdr_offload=cpu"] == strong.weight_bytes
    assert by_option["the default"] == strong.weight_bytes + weak.weight_bytes


def test_what_to_change_is_what_fits():
    model = count(LlamaConfig(**LLAMA_8B))
    ways = holdings(model, model)
    assert advise(ways, ways[0], 80 * GB).startswith("It fits: the pair (two copies) takes 34.6 of 80.0 GB")
    less = advise(ways, ways[0], 19 * GB)
    assert less.startswith("It does not fit: the pair (two copies) takes 34.6 GB of 19.0. What does: ")
    assert "cdr_offload=cpu (18.6 GB)" in less
    assert "load_in_4bit (14.6 GB)" in less
    assert "load_in_8bit" not in less
    assert "Nor does any other way: take a smaller pair" in advise(ways, ways[0], GB)


def test_a_config_of_no_causal_language_model():
    with pytest.raises(ModelError, match="strong is a vit, of which no causal language model can be built"):
        count(ViTConfig())


def test_measured_bytes_count_ties_once_and_what_is_beside_weights():
    model = llama(50, seed=0)
    expected = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert measured_bytes(model) == expected
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    assert measured_bytes(tied) == 36
    tied[0].weight.SCB = torch.zeros(3)  # as bitsandbytes keeps its scales
    assert measured_bytes(tied) == 48
    tied[0].weight.data = torch.zeros(()).expand(3, 3)
    assert measured_bytes(tied) == 36 + 12 + 4
    assert weight_bytes(tied) == 36 + 12 + 36  # as if it were awake
    assert measured_bytes(model, tied, model) == expected + 36 + 12 + 4
