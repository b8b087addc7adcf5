"""Adapters on weights that are held once: a model's modules anew over the tensors that it has, and an adapter on them.

Nothing is switched: a base and each adapter on it are models of their own whose large tensors are the same ones.
`sources` finds adapters, `causal_lm` runs what comes out. The only module that knows peft.
"""

import copy
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ConfigError, ModelError
from .loading import whole_weights
from .sources import WEIGHTS, Adapter
from .weights import fingerprint

_PREFIX = "base_model.model."  # that peft puts before a base's names


def view(model: Any) -> Any:
    """
    A model with modules, buffers' places and config of its own over the very tensors of another: nothing that is done
    to its modules reaches the other, and what is done to the tensors is seen by both.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@whole_weights()
def attach(base: Any, adapter: Adapter, role: str) -> Any:
    """
    A base with an adapter, as a model of its own. The base stays as it is, and its weights are the only copy.

    Args:
        base (`PreTrainedModel`): Loaded, on its device.
        adapter (`Adapter`): Found and looked at by `sources`.
        role (`str`): `"strong"` or `"weak"`, for messages.

    Returns:
        `PreTrainedModel`: as the base, in evaluation mode, with the adapter's own weights in the type of the base's.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the adapter does not fit the base.
    """
    peft = _import_peft(f"{role} has the adapter {adapter.name!r}")
    before = fingerprint(base)
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        weights = load_file(adapter.folder / WEIGHTS)
        # Weights are drawn before they are read, and the trainer's numbers must not shift.
        devices = sorted({p.device.index for p in base.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), torch.device("cpu"), warnings.catch_warnings():
            # peft 0.21 reads what transformers 5 deprecates
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            adapted = peft.PeftModel(view(base), config, autocast_adapter_dtype=False)
        own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        weights = _without_base(weights, own, dict(base.named_parameters()))
        reason = _misfit({name: tensor.shape for name, tensor in weights.items()}, own)
        if reason is None:
            peft.set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # peft has a dozen ways to say that an adapter does not fit
        raise ModelError(f"{_name(adapter, role)} does not fit its base: {' '.join(str(error).split())}") from error
    if reason is not None:
        raise ModelError(f"{_name(adapter, role)} does not fit its base: {reason}")
    if fingerprint(base) != before:
        raise ModelError(f"{_name(adapter, role)} changes the weights of its base, and a base is shared. Merge it.")
    model = adapted.get_base_model().eval()
    shared = {id(tensor) for tensor in base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return model


def merge(base: Any, folder: Path) -> Any:
    """
    A base with an adapter added to its own weights, for good.

    Args:
        base (`PreTrainedModel`): Loaded; it is used up.
        folder (`Path`): The adapter, as peft has just saved it.

    Raises:
        ConfigError: peft is not installed.
    """
    peft = _import_peft(f"{str(folder)!r} holds an adapter")
    with warnings.catch_warnings():
        # peft 0.21 reads what transformers 5 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def unwrap(model: Any) -> Any:
    """The transformers model inside of a `PeftModel`, adapters and all; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _import_peft(why: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"{why}, and peft can't be imported ({error}). Run: pip install 'trl-cdr[peft]'") from error


def _name(adapter: Adapter, role: str) -> str:
    return f"the adapter of {role} ({adapter.name})"


def _without_base(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    An adapter's file without weights of the base that peft saved along with it (of embeddings that it targets).

    Raises:
        ModelError: they are not the base's.
    """
    kept = {}
    for name, tensor in weights.items():
        theirs = base.get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if name in own or theirs is None:
            kept[name] = tensor
        elif theirs.shape != tensor.shape:
            raise ModelError(
                f"it holds {name} of shape {tuple(tensor.shape)}, and the base's is {tuple(theirs.shape)}: its "
                "embeddings were resized. Merge it into its base."
            )
        elif not torch.equal(theirs.cpu(), tensor.to(theirs.dtype)):
            raise ModelError(f"it holds {name} with other values than the base's. Merge it into its base.")
    return kept


def _misfit(shapes: Mapping[str, torch.Size], own: Mapping[str, Tensor]) -> str | None:
    """How the weights that an adapter has differ from those that the base has a place for."""
    missing, extra = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing:
        return f"it lacks {len(missing)} of the weights that the base has a place for ({missing[0]}, ...)"
    if extra:
        return f"it has {len(extra)} weights that the base has no place for ({extra[0]}, ...)"
    for name, tensor in own.items():
        if tensor.shape != shapes[name]:
            return f"its {name} has the shape {tuple(shapes[name])}, and the base wants {tuple(tensor.shape)}"
    return None
