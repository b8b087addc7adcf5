"""What a pair takes of a device's memory, by arithmetic from its configs. Loads no weights; prints nothing.

Parameters are counted on a model that torch builds without memory (the meta device), so that they are exact, ties
included. `causal_lm` has its own work estimated here; `doctor` prints the table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .forward import Decoder
from .logps import logits_per_chunk
from .packed import Packed, attention_windows, why_not_packed
from .weights import plain_tensors

GB = 10**9

LORA_RANK = 16
_INT8_ROW = 4  # bitsandbytes: a scale for each row of a weight, float32
_NF4_BLOCK = 64  # bitsandbytes: a float32 for each 64 weights of half a byte
_INT8 = "quantization_config: load_in_8bit"  # in cdr_model_init_kwargs
_NF4 = "quantization_config: load_in_4bit"


@dataclass(frozen=True)
class Footprint:
    """
    What one model needs, by its config.

    Attributes:
        parameters (`int`): Its numbers, those that are tied once.
        linear (`int`): Of these, weights of linear layers, without the head: what quantisation makes smaller.
        rows, columns (`int`): Outputs and inputs of these layers, added up.
        itemsize (`int`): Bytes of a number.
        prefix_bytes (`int`): Keys and values of criteria that are kept between calls, at most.
        work_bytes (`int`): About what a forward needs beside the weights.
        shape (`tuple`): Each parameter's size; models of equal shapes can be one base with adapters.
    """

    parameters: int
    linear: int
    rows: int
    columns: int
    itemsize: int
    prefix_bytes: int
    work_bytes: int
    shape: tuple[tuple[int, ...], ...]

    @property
    def weight_bytes(self) -> int:
        """As the checkpoint has them, in the type that they are loaded in."""
        return self.parameters * self.itemsize

    @property
    def int8_bytes(self) -> int:
        """The linear layers a byte each, with a scale for each row."""
        return self.linear + self.rows * _INT8_ROW + (self.parameters - self.linear) * self.itemsize

    @property
    def nf4_bytes(self) -> int:
        """The linear layers half a byte each, with a float32 for each 64."""
        return self.linear // 2 + self.linear // _NF4_BLOCK * 4 + (self.parameters - self.linear) * self.itemsize

    @property
    def lora_bytes(self) -> int:
        """A LoRA adapter on all these linear layers, in the model's type."""
        return LORA_RANK * (self.rows + self.columns) * self.itemsize


@dataclass(frozen=True)
class Holding:
    """
    One way to hold a pair.

    Attributes:
        name (`str`): What it is called.
        weight_bytes (`int` or `None`): Weights on the device at a time; `None` where this pair can't be held so.
        host_bytes (`int`): Weights in the host's memory, for each process.
        extra_bytes (`int`): Kept prefixes and work, on the device.
        option (`str`): What asks for it.
    """

    name: str
    weight_bytes: int | None
    host_bytes: int
    extra_bytes: int
    option: str

    @property
    def device_bytes(self) -> int | None:
        """All that it takes of the device at a time."""
        return None if self.weight_bytes is None else self.weight_bytes + self.extra_bytes


def footprint(
    config: PretrainedConfig,
    role: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    token_budget: int,
    prefix_tokens: int,
) -> Footprint:
    """
    What a model will need, before any of its weights are there.

    Args:
        config (`PretrainedConfig`): The model's.
        role (`str`): `"strong"` or `"weak"`, for the message.
        dtype (`torch.dtype`): Type that it is loaded in.
        device (`torch.device`): Where it will be.
        token_budget (`int`): `cdr_token_budget`.
        prefix_tokens (`int`): Tokens of criteria that are kept, at most.

    Raises:
        ModelError: transformers has no causal language model for the config.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()  # transformers 5.0 does not tie them on the meta device
    except Exception as error:  # a config may lack anything
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{role} is a {config.model_type}, of which no causal language model can be built: {reason[:300]}"
        ) from error
    decoder = _Planned(model, model.config.get_text_config(), device, dtype)
    packed = Packed(decoder, prefix_cache_tokens=prefix_tokens) if why_not_packed(decoder) is None else None
    head = model.get_output_embeddings()
    linear = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    linear = [weight for weight in linear if weight is not head.weight]
    parameters = list(model.parameters())
    return Footprint(
        parameters=sum(parameter.numel() for parameter in parameters),
        linear=sum(weight.numel() for weight in linear),
        rows=sum(weight.shape[0] for weight in linear),
        columns=sum(weight.shape[1] for weight in linear),
        itemsize=dtype.itemsize,
        prefix_bytes=prefix_bytes(decoder, packed, prefix_tokens),
        work_bytes=work_bytes(decoder, packed, token_budget, prefix_tokens),
        shape=tuple(tuple(parameter.shape) for parameter in parameters),
    )


def holdings(strong: Footprint, weak: Footprint, *, is_shared: bool = False) -> list[Holding]:
    """
    The ways to hold a pair, the plainest first.

    Args:
        strong, weak (`Footprint`): What each needs, without an adapter.
        is_shared (`bool`, *optional*, defaults to `False`): The pair is one base with adapters, which stay awake.
    """
    pair = (strong, weak)
    whole = sum(each.weight_bytes for each in pair)
    work = max(each.work_bytes for each in pair)  # one runs at a time
    kept, one_kept = sum(each.prefix_bytes for each in pair), max(each.prefix_bytes for each in pair)
    is_one_base = strong.shape == weak.shape
    adapter = strong.lora_bytes if is_one_base else None
    on_base = None if adapter is None else weak.weight_bytes + adapter
    if is_shared and on_base is not None:
        asleep, awake = weak.weight_bytes, on_base
    else:
        asleep, awake = whole, max(each.weight_bytes for each in pair)
    return [
        Holding("two copies", whole, 0, work + kept, "the default"),
        Holding(f"one base, an adapter of rank {LORA_RANK}", on_base, 0, work + kept, "cdr_strong_adapter"),
        Holding("asleep between calls, on the host", awake, asleep, work + one_kept, "cdr_offload=cpu"),
        Holding("asleep between calls, on disk", awake, 0, work + one_kept, "cdr_offload=disk"),
        Holding("two copies in 8 bits", sum(each.int8_bytes for each in pair), 0, work + kept, _INT8),
        Holding("two copies in 4 bits", sum(each.nf4_bytes for each in pair), 0, work + kept, _NF4),
        Holding(f"on the policy's base, rank {LORA_RANK}", adapter, 0, work + kept, "cdr_share_policy"),
    ]


def advise(ways: Sequence[Holding], current: Holding, memory: int) -> str:
    """
    One sentence: whether a pair fits, and what to change where it does not.

    Args:
        ways (`Sequence[Holding]`): As `holdings` has them.
        current (`Holding`): The one that is asked for.
        memory (`int`): Bytes that there are.
    """
    needed = current.device_bytes
    assert needed is not None
    if needed <= memory:
        return (
            f"It fits: the pair ({current.name}) takes {needed / GB:,.1f} of {memory / GB:,.1f} GB; the policy, its "
            "optimizer and vLLM come on top."
        )
    fits = [way for way in ways if way.device_bytes is not None and way.device_bytes <= memory]
    start = f"It does not fit: the pair ({current.name}) takes {needed / GB:,.1f} GB of {memory / GB:,.1f}."
    if not fits:
        return f"{start} Nor does any other way: take a smaller pair, a smaller cdr_token_budget or another cdr_device."
    options = "; ".join(f"{way.option} ({(way.device_bytes or 0) / GB:,.1f} GB)" for way in fits)
    return f"{start} What does: {options}."


def measured_bytes(*models: nn.Module) -> int:
    """
    Bytes of the parameters and buffers that models hold: what quantisation adds included, what is tied or held by
    several of them once, those that sleep not.
    """
    return sum(min(part.nbytes, part.untyped_storage().nbytes()) for part in _distinct(models))


def weight_bytes(*models: nn.Module) -> int:
    """As `measured_bytes`, those that sleep as if they were awake."""
    return sum(part.nbytes for part in _distinct(models))


def prefix_bytes(decoder: Decoder, packed: Packed | None, tokens: int) -> int:
    """Keys and values of kept tokens; none are kept where a model is not packed."""
    return 0 if packed is None else tokens * _kept_values(decoder.config) * decoder.dtype.itemsize


def work_bytes(decoder: Decoder, packed: Packed | None, token_budget: int, prefix_tokens: int) -> int:
    """
    What a forward needs beside the weights: some hidden states, a layer's inner ones and a chunk of logits; of a pack
    also its masks, its keys and values, and a copy of those that are kept before it.
    """
    config = decoder.config
    tokens, size = decoder.batch_tokens(token_budget), decoder.dtype.itemsize
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    work = tokens * (6 * hidden + 3 * inner) * size + 3 * 4 * logits_per_chunk(decoder.device)
    if packed is not None:
        limits = packed.limits(token_budget)
        work += len(attention_windows(config)) * limits.entries * (size + 1)  # a boolean one beside each
        work += (limits.most(0) + prefix_tokens) * _kept_values(config) * size
    return work


def _kept_values(config: PretrainedConfig) -> int:
    """Numbers that the keys and values of a kept token are, over all layers."""
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return 2 * int(config.num_hidden_layers) * kept_heads * size


def _distinct(models: Iterable[nn.Module]) -> Iterable[Tensor]:
    """The plain tensors of the models, each place in a memory once; those that sleep have a place too."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {(part.device, part.data_ptr()): part for tensor in tensors for part in plain_tensors(tensor)}.values()


class _Planned(Decoder):
    """A decoder whose weights are nowhere yet, as it will be."""

    device: Any = None
    dtype: Any = None

    def __init__(self, model: Any, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(model, config)
        self.device, self.dtype = device, dtype
