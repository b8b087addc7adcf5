"""A policy that trains an adapter -> its base as a model of its own, for a pair that stands on the same weights.

The policy is only ever looked at: the base is a view (`adapters`) that is in nobody's module tree, and neither flags
nor modes of the policy are touched. `pair_source` holds it, `training.reward` says which policy.
"""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import _compat
from ..config import CDRConfig
from ..errors import ConfigError, ModelError
from .adapters import unwrap, view
from .checkpoint import find_folder
from .loading import hub_kwargs
from .sources import Source, share_base
from .weights import fingerprint, is_whole

_REMEDY = "Leave out cdr_share_policy: the pair is then loaded beside the policy."
_ROWS, _SMALL = 16, 2**16  # of a large matrix so many rows are compared, of what has fewer numbers all


class PolicyBase:
    """
    The base of a policy, shared.

    Args:
        policy (`nn.Module`): A `PeftModel`, as the trainer has it; not kept alive.

    Attributes:
        model (`PreTrainedModel`): The base without any adapter, in evaluation mode: modules of its own over the
            policy's tensors.

    Raises:
        ConfigError: the policy has no adapter, or its base is quantised or spread over processes or devices.
    """

    def __init__(self, policy: nn.Module) -> None:
        _refuse_unfit(policy)
        self._policy = weakref.ref(policy)
        self.model = _strip(unwrap(policy))
        self._fingerprint = fingerprint(self.model)

    def is_of(self, policy: nn.Module) -> bool:
        """Whether this is the base of that policy, and of the tensors that it has now."""
        mine = [*self.model.parameters(), *self.model.buffers()]
        theirs = {id(parameter) for parameter in policy.parameters()}
        is_whole = all(id(parameter) in theirs for parameter in self.model.parameters())
        return self._policy() is policy and is_whole and len({tensor.device for tensor in mine}) == 1

    def check(self) -> None:
        """
        Whether the base is as it was loaded.

        Raises:
            ConfigError: the policy trains some of it, or has its adapter merged into it.
        """
        policy = self._policy()
        assert policy is not None
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if trained:
            raise ConfigError(
                f"cdr_share_policy is set, and the policy trains {len(trained)} weights of its base ({trained[0]}, "
                f"...): the pair would change with every step. {_REMEDY}"
            )
        if any(_compat.is_merged(module) for module in policy.modules()):
            raise ConfigError(
                "cdr_share_policy is set, and the policy's adapter is merged into its base: the pair would be scored "
                "with it. Call unmerge_adapter() first."
            )

    def has_changed(self) -> bool:
        """Whether any weight is another than when this was last asked, at the price of reading them all."""
        before, self._fingerprint = self._fingerprint, fingerprint(self.model)
        return before != self._fingerprint


def check_shared(config: CDRConfig, sources: Mapping[str, Source], base: nn.Module) -> None:
    """
    Whether a policy's base is what the options name.

    Args:
        config (`CDRConfig`): The options.
        sources (`Mapping[str, Source]`): Where strong and weak come from.
        base (`nn.Module`): `PolicyBase.model`.

    Raises:
        ConfigError: strong and weak stand on different bases, or the options ask for another type, another device or
            other arguments than the policy has.
        ModelError: the policy's base has other weights, or they can't be compared.
    """
    if not share_base(config, sources):
        names = " and ".join(repr(source.name) for source in sources.values())
        raise ConfigError(f"cdr_share_policy is set, and strong and weak have two bases, {names}. {_REMEDY}")
    parameter = next(base.parameters())
    dtype, device = str(parameter.dtype).removeprefix("torch."), parameter.device
    if config.cdr_dtype not in ("auto", dtype):
        raise ConfigError(
            f"cdr_share_policy is set, cdr_dtype is {config.cdr_dtype!r}, and the policy's base is {dtype}: weights "
            f"that are held once have one type. Load the policy in {config.cdr_dtype}, or leave out cdr_dtype."
        )
    if config.cdr_device != "auto" and torch.device(config.cdr_device) != device:
        raise ConfigError(
            f"cdr_share_policy is set, cdr_device is {config.cdr_device!r}, and the policy is on {device}. Leave out "
            "cdr_device."
        )
    kwargs: Any = config.cdr_model_init_kwargs or {}
    unheeded = sorted(kwargs.keys() - hub_kwargs(kwargs).keys())
    if unheeded:
        raise ConfigError(
            f"cdr_share_policy is set, and cdr_model_init_kwargs has {unheeded[0]!r}: the base is the policy's, and "
            "is not loaded. Give it to the policy, or leave it out."
        )
    source = sources["weak"]
    folder = find_folder(source.name, "weak", revision=source.revision, init_kwargs=kwargs)
    reason = _differs(base, folder)
    if reason is not None:
        revision = "" if source.revision is None else f" at {source.revision!r}"
        raise ModelError(
            f"cdr_share_policy is set, and the policy's base is not {source.name!r}{revision}: {reason}. Name the base "
            "that the policy was loaded from, at its revision, or leave out cdr_share_policy."
        )


def _refuse_unfit(policy: Any) -> None:
    if not hasattr(policy, "peft_config"):
        raise ConfigError(
            f"cdr_share_policy is set, and the policy ({type(policy).__name__}) has no adapter: its own weights are "
            "trained, and the pair would change with every step. Train a LoRA adapter (peft_config=, use_peft), or "
            "leave out cdr_share_policy."
        )
    model = unwrap(policy)
    parameters = list(model.parameters())
    if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in parameters):
        raise ConfigError(
            "cdr_share_policy is set, and the policy's base is quantised: its numbers are not those of the checkpoint "
            f"that the pair is named by, and are computed with in another type. {_REMEDY}"
        )
    if not is_whole(model):
        raise ConfigError(f"cdr_share_policy is set, and the policy is spread over processes (FSDP, ZeRO-3). {_REMEDY}")
    if len({p.device for p in parameters}) > 1 or any(_compat.is_dispatched(module) for module in model.modules()):
        raise ConfigError(f"cdr_share_policy is set, and the policy is spread over devices. {_REMEDY}")


def _strip(model: Any) -> Any:
    """A view of a model without its adapters, and without what a trainer has hung on its modules."""
    mine = view(model)
    vars(mine).pop("peft_config", None)
    for module in list(mine.modules()):
        children = _compat.children(module)
        for name, child in children.items():
            if child is not None:
                children[name] = _compat.without_peft(child)
    for module in mine.modules():
        _compat.clear_hooks(module)  # also the forward of a kernel or of autocast
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return mine.eval()


def _differs(model: nn.Module, folder: Path) -> str | None:
    """How a model's weights differ from a checkpoint's, told by rows of each; None where they don't."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    compared = total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        key = next((key for key in (name, name.removeprefix(prefix)) if key in files), None)
        if key is None:
            continue
        with safe_open(files[key], "pt") as file:
            part = file.get_slice(key)
            if tuple(part.get_shape()) != tuple(parameter.shape):
                return f"{name} has the shape {tuple(parameter.shape)}, and there {tuple(part.get_shape())}"
            if not all(_is_equal(parameter[rows], part[rows]) for rows in _rows(parameter)):
                return f"{name} has other values"
        compared += parameter.numel()
    if 2 * compared < total:
        return f"of {total:,} numbers {compared:,} can be found under their names in {str(folder)!r}"
    return None


def _rows(parameter: Tensor) -> list[slice]:
    count = len(parameter)
    if parameter.numel() <= _SMALL or count <= _ROWS:
        return [slice(0, count)]
    return [slice(row, row + 1) for row in {(count - 1) * index // (_ROWS - 1) for index in range(_ROWS)}]


def _is_equal(mine: Tensor, theirs: Tensor) -> bool:
    return torch.equal(mine.detach().cpu(), theirs.to(mine.dtype))
