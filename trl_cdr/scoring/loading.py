"""A name or a path -> a frozen model with all its weights, on one device, or an error that says why not.

Runs nothing: `causal_lm` does. `pair_loading` loads tokenizers.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from .._compat import without_deepspeed
from ..errors import ConfigError, ModelError
from .weights import check_whole

_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Have libraries give this process all of a model's weights. Under DeepSpeed ZeRO-3 they would be partitioned, and
    under FSDP's RAM-efficient loading stay empty on every process of a node but the first: both are for the policy.
    """
    held = os.environ.pop(_RAM_EFFICIENT, None)
    try:
        with without_deepspeed():
            yield
    finally:
        if held is not None:
            os.environ[_RAM_EFFICIENT] = held


@whole_weights()
def load_model(
    name: str,
    role: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    init_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """
    Load a causal language model, in evaluation mode and without gradients. Arguments and errors: see `CausalLM.load`.
    """
    place = find_device(device)
    loading = {
        "revision": revision,
        "dtype": _choose_dtype(dtype, place),
        # transformers 4.56 looks for an accelerator's index where a process group is; drop the condition with the floor
        **({} if place.type == "cpu" else {"device_map": {"": place}}),
        "trust_remote_code": False,
        "use_safetensors": True,
        **(init_kwargs or {}),
    }
    old_name = loading.pop("torch_dtype", None)
    loading["dtype"] = old_name or loading["dtype"]
    try:
        if isinstance(loading.get("quantization_config"), Mapping):  # of YAML, the command line, the environment
            loading["quantization_config"] = AutoQuantizationConfig.from_dict(dict(loading["quantization_config"]))
        config = AutoConfig.from_pretrained(name, **hub_kwargs(loading))
        refuse_encoder_decoder(config, role)
        cuda = [place.index or 0] if place.type == "cuda" else []
        # Loading may draw, and the trainer's numbers must not shift; nor does a default device say where it goes.
        place_context = torch.device("cpu") if place.type == "cpu" else nullcontext()
        with torch.random.fork_rng(devices=cuda), place_context:
            model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **loading)
    except ModelError:
        raise
    except Exception as error:  # the libraries below have a dozen ways to say that it can't be loaded
        raise ModelError(f"{role} is {name!r}, which can't be loaded as a causal language model: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{role} is {name!r}, whose checkpoint lacks {len(missing)} weights ({missing[0]}, ...): they would be "
            "random. Use a checkpoint of a causal language model."
        )
    check_whole(model, role)
    model.requires_grad_(False)
    model.eval()
    return model


def hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where a repository is, for its config and its tokenizer."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def refuse_encoder_decoder(config: PretrainedConfig, role: str) -> None:
    """
    Raises:
        ModelError: the architecture has an encoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{role} is a {config.model_type}, an encoder-decoder: a completion must continue its prompt in one "
            "sequence. Use a decoder-only model."
        )


def find_device(device: str) -> torch.device:
    """
    What `cdr_device` stands for.

    Raises:
        ConfigError: torch does not know it.
    """
    if device == "auto":
        return cast(torch.device, PartialState().device)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"cdr_device is {device!r}, which torch does not know. Use auto, cpu or cuda:0, say."
        ) from error


def expected_dtype(config: PretrainedConfig, dtype: str, device: torch.device) -> torch.dtype:
    """The type that weights will be loaded in, by a checkpoint's config; float32 where that names none."""
    chosen = _choose_dtype(dtype, device)
    if chosen == "auto":
        chosen = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)  # type: ignore[no-any-return]
