"""Adapters for the tests: random ones that change scores by nats, and their bases merged with them."""

import json
import warnings
from pathlib import Path

import peft
import torch
from tiny import chat
from transformers import AutoModelForCausalLM

from trl_cdr import Criteria, DomainCriteria

CRITERIA = Criteria({"quick": DomainCriteria("the quick brown fox is quick and brown, and jumps over a lazy dog " * 2)})
PROMPTS = [chat("hello world"), chat("hello world"), chat("what is this and that"), chat("the quick " * 9)]
COMPLETIONS = ["this and that", "brown fox jumps over", "a lazy dog", "hello"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        # peft 0.21 reads what transformers 5 deprecates, and says what it saves of targeted embeddings
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*save_embedding_layers|.*tie_word_embeddings|.*tied")
        return function(*args, **kwargs)


def adapt(model, *, seed=0, kind="LoraConfig", scale=0.1, **config):
    """A `PeftModel` whose every own weight is random."""
    config = {"target_modules": ALL, "task_type": "CAUSAL_LM"} | ({"r": 4} if kind != "IA3Config" else {}) | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = _quiet(peft.get_peft_model, model, getattr(peft, kind)(**config))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # of magnitudes (DoRA, IA3) and copies of whole modules it is the change that is drawn
                drawn = torch.randn_like(parameter) * scale
                is_kept = any(word in name for word in ("magnitude", "ia3", "modules_to_save", "trainable_tokens"))
                parameter.data = parameter.data + drawn if is_kept else drawn
    return adapted.eval()


def save_adapter(folder, base, *, names_base=True, **config):
    """An adapter of a checkpoint, in a folder of its own; returns the folder's name."""
    adapted = adapt(AutoModelForCausalLM.from_pretrained(base), **config)
    _quiet(adapted.save_pretrained, folder)
    path = Path(folder) / "adapter_config.json"
    content = json.loads(path.read_text())
    content["base_model_name_or_path"] = str(base) if names_base else None
    path.write_text(json.dumps(content))
    return str(folder)


def save_merged(folder, base, adapter, tokenizer):
    """The base with the adapter's weights added to its own, by peft; returns the folder's name."""
    adapted = _quiet(peft.PeftModel.from_pretrained, AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
