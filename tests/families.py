"""Architectures, each built tiny from its config, the way in which each of them runs, and rows for them."""

import random

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from trl_cdr.scoring.types import Row

try:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
except ImportError:  # transformers 4.56 does not know it
    Qwen3NextForCausalLM = None
try:
    from transformers import Olmo3Config, Olmo3ForCausalLM
except ImportError:  # nor this
    Olmo3ForCausalLM = None

V = 61
_SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
# Of a model without attention: its config has no heads.
_ABSENT = object()
_RECURRENT = {"num_attention_heads": _ABSENT, "num_key_value_heads": _ABSENT}
_WINDOW = 11  # shorter than the rows that are run


def _mixed_layers(**config):
    return {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": _WINDOW, "head_dim": 8, **config}


# name: (model, config, what differs, the way it runs)
FAMILIES = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}, "packed"),
    "Mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, "packed"),
    "Mistral, sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": _WINDOW}, "packed"),
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "sliding_window": None}, "packed"),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, "packed"),
    "Qwen2, sliding window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
        "packed",
    ),
    "Qwen2-MoE": (Qwen2MoeForCausalLM, Qwen2MoeConfig, _MOE, "packed"),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}, "packed"),
    "Qwen3-MoE": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_MOE, "head_dim": 8}, "packed"),
    "SmolLM3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [1, 0]}, "packed"),
    "Gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 8}, "packed"),
    "Gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        _mixed_layers(final_logit_softcapping=2.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
        "packed",
    ),
    "Gemma 3": (Gemma3ForCausalLM, Gemma3TextConfig, _mixed_layers(query_pre_attn_scalar=8), "packed"),
    "Phi-3": (Phi3ForCausalLM, Phi3Config, {}, "packed"),
    "Phi-3, LongRoPE": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "original_max_position_embeddings": 20,  # some of the rows that are run are longer
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        },
        "packed",
    ),
    "Granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}, "packed"),
    "Cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}, "packed"),
    "Cohere 2": (Cohere2ForCausalLM, Cohere2Config, _mixed_layers(logit_scale=0.3), "packed"),
    "OLMo": (OlmoForCausalLM, OlmoConfig, {}, "packed"),
    "OLMo 2": (Olmo2ForCausalLM, Olmo2Config, {}, "packed"),
    "GPT-2": (GPT2LMHeadModel, GPT2Config, {}, "packed"),
    "GPT-NeoX": (GPTNeoXForCausalLM, GPTNeoXConfig, {}, "packed"),
    "GPT-Neo": (  # its local layers see a window of places in the sequence
        GPTNeoForCausalLM,
        GPTNeoConfig,
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": _WINDOW},
        "padded",
    ),
    "BLOOM": (BloomForCausalLM, BloomConfig, {}, "padded"),
    "Mamba": (MambaForCausalLM, MambaConfig, {**_RECURRENT, "state_size": 8}, "padded"),
    "Bamba": (
        BambaForCausalLM,
        BambaConfig,
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        "padded",
    ),
}
if Olmo3ForCausalLM is not None:
    FAMILIES["OLMo 3"] = (Olmo3ForCausalLM, Olmo3Config, _mixed_layers(), "packed")
if Qwen3NextForCausalLM is not None:
    FAMILIES["Qwen3-Next"] = (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            **_MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 8,
        },
        "padded",
    )

# Families that the tests of kept keys and values, and the canary, leave out.
MORE_FAMILIES = {
    "OLMoE": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}, "packed"),
    "Llama 4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "head_dim": 8,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        },
        "padded",
    ),
    "Mamba 2": (
        Mamba2ForCausalLM,
        Mamba2Config,
        {**_RECURRENT, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        "padded",
    ),
    "Falcon-Mamba": (FalconMambaForCausalLM, FalconMambaConfig, {**_RECURRENT, "state_size": 8}, "padded"),
    "RWKV": (RwkvForCausalLM, RwkvConfig, {**_RECURRENT, "attention_hidden_size": 32}, "padded"),
}
if hasattr(Gemma3TextConfig(), "rope_parameters"):  # transformers 5: RoPE's parameters by layer type
    MORE_FAMILIES["Gemma 3, LongRoPE"] = (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _mixed_layers(
            query_pre_attn_scalar=8,
            rope_parameters={
                "full_attention": {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "original_max_position_embeddings": 20,  # some of the rows that are run are longer
                    "factor": 4.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        "packed",
    )
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


def build_family(name, **options):
    """A random model of the family, in evaluation mode. `options` change its config."""
    model_class, config_class, differs, _ = ALL_FAMILIES[name]
    config = {key: value for key, value in {**_SMALL, **differs, **options}.items() if value is not _ABSENT}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config_class(**config)).eval()


def random_rows(seed, *, num_prefix, num_ids=V):
    """Prompts behind a common prefix, two of them long, shared by some completions, of odd lengths."""
    rng = random.Random(seed)

    def draw(shortest, longest):
        return tuple(rng.randrange(num_ids) for _ in range(rng.randint(shortest, longest)))

    prefix = draw(num_prefix, num_prefix)
    prompts = [prefix + draw(*lengths) for lengths in ((1, 9), (1, 9), (1, 9), (40, 60), (70, 90))]
    completions = [draw(1, 17) for _ in range(12)]
    return [Row(prompts[index % len(prompts)], completion) for index, completion in enumerate(completions)]
