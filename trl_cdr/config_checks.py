"""What a config's values have to be, one by one and beside each other. Imports no torch and loads nothing.

`config` has the fields; each function here raises a `ConfigError` that says what to write.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any, get_args

from .errors import ConfigError

LOCAL_ARGUMENTS = frozenset({"token", "cache_dir", "local_files_only"})
"""Of `from_pretrained`: whose machine it is and who asks, not which models."""
# Of `from_pretrained`: weights under these can't be moved.
_FIXED_WEIGHTS = ("quantization_config", "load_in_8bit", "load_in_4bit", "device_map")
# Of `apply_chat_template`, and ours to set.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
}


def check_values(config: Any) -> None:
    """
    Check all that types do not say.

    Args:
        config (`CDRConfig`): Its values, of the right types.

    Raises:
        ConfigError: a value, or two beside each other, can't be meant.
    """
    for check in (_check_names, _check_weights, _check_served, _check_numbers, _check_criteria, _check_template):
        check(config)


def _check_names(config: Any) -> None:
    """Names, paths and revisions."""
    for name in ("cdr_strong", "cdr_weak", "cdr_strong_adapter", "cdr_weak_adapter", "cdr_device"):
        if getattr(config, name) is not None and not getattr(config, name).strip():
            raise ConfigError(f"{name} is empty. Give a name or a path.")
    for name in ("cdr_strong_adapter", "cdr_weak_adapter"):
        revision = getattr(config, f"{name}_revision")
        if revision is not None and getattr(config, name) is None:
            raise ConfigError(
                f"{name}_revision is {revision!r} and {name} is missing. Pass the adapter; of one that stands in "
                f"the place of its model the revision is {name.removesuffix('_adapter')}_revision."
            )
    if not config.cdr_name.isidentifier():
        raise ConfigError(
            f"cdr_name is {config.cdr_name!r}: it becomes part of a function's name. Use letters, digits and _."
        )


def _check_weights(config: Any) -> None:
    """What can't be done with weights that others use, or that can't be moved."""
    if config.cdr_share_policy and config.cdr_offload != "none":
        raise ConfigError(
            f"cdr_share_policy is set and cdr_offload is {config.cdr_offload!r}: the pair stands on weights that the "
            "policy trains on, and those stay where they are. Leave out one of the two."
        )
    if config.cdr_share_policy and config.cdr_replicas != "rank":
        raise ConfigError(
            f"cdr_share_policy is set and cdr_replicas is {config.cdr_replicas!r}: the pair stands on the policy's "
            "base, which is in every process. Leave out one of the two."
        )
    fixed = [name for name in _FIXED_WEIGHTS if name in (config.cdr_model_init_kwargs or {})]
    if config.cdr_offload != "none" and fixed:
        raise ConfigError(
            f"cdr_offload is {config.cdr_offload!r}, and cdr_model_init_kwargs has {fixed[0]!r}: weights that are "
            "quantised or spread over devices can't be moved. Leave out one of the two."
        )


def _check_served(config: Any) -> None:
    """What can't be asked of a model that is on a server."""
    served = config.served
    for role in served:
        for name in (f"cdr_{role}_revision", f"cdr_{role}_adapter"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} is {getattr(config, name)!r}, and cdr_{role} is on a server, which serves what it was "
                    f"started with. Leave it out, and start the server with it (--revision, --lora-modules)."
                )
    if served and config.cdr_share_policy:
        raise ConfigError(
            f"cdr_share_policy is set, and cdr_{served[0]} is on a server: the policy's base is here. Leave out "
            "cdr_share_policy, or name the base."
        )
    if "strong" in served and config.cdr_gate != "none":
        raise ConfigError(
            f"cdr_gate is {config.cdr_gate!r} (where it is left out, too), and cdr_strong is on a server: the gate "
            "needs the strong model's whole distribution at every token, and a server gives the log-probabilities "
            "of the tokens alone. Write cdr_gate='none', the paper's plain ratio, and watch the run; or load "
            "strong here, beside which weak may stay on its server."
        )
    if len(served) == 2:
        for name in ("cdr_dtype", "cdr_device", "cdr_offload"):
            if getattr(config, name) != getattr(type(config), name):
                raise ConfigError(
                    f"{name} is {getattr(config, name)!r}, and strong and weak are on servers: nothing of them is "
                    f"here. Leave it out, and start the servers as they are to run (--dtype)."
                )
        others = sorted(set(config.cdr_model_init_kwargs or {}) - LOCAL_ARGUMENTS)
        if others:
            raise ConfigError(
                f"cdr_model_init_kwargs has {others[0]!r}, and strong and weak are on servers: only their "
                "tokenizers are loaded here. Leave it out, and start the servers as they are to run."
            )


def _check_numbers(config: Any) -> None:
    """What counts something."""
    if config.cdr_token_budget < 1:
        raise ConfigError(f"cdr_token_budget is {config.cdr_token_budget}: it counts tokens. Use 1 or more.")
    if config.cdr_prefix_cache_tokens < 0:
        raise ConfigError(
            f"cdr_prefix_cache_tokens is {config.cdr_prefix_cache_tokens}: it counts tokens. Use 0 or more."
        )
    if config.cdr_num_exemplars < 0:
        raise ConfigError(f"cdr_num_exemplars is {config.cdr_num_exemplars}: it counts exemplars. Use 0 or more.")
    if config.cdr_max_length is not None and config.cdr_max_length < 2:
        raise ConfigError(
            f"cdr_max_length is {config.cdr_max_length}: a row has at least one prompt and one completion token. "
            "Use 2 or more, or leave it out for the model's number of positions."
        )


def _check_criteria(config: Any) -> None:
    """What goes with criteria alone."""
    if config.cdr_criteria is None:
        for name in ("cdr_domain", "cdr_router"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} is {getattr(config, name)!r} and cdr_criteria is missing: a domain selects criteria. "
                    f"Pass cdr_criteria, or leave {name} out."
                )


def _check_template(config: Any) -> None:
    """A chat template, its variables and its date."""
    if config.cdr_date is not None:
        try:
            date.fromisoformat(config.cdr_date)
        except ValueError:
            raise ConfigError(f"cdr_date is {config.cdr_date!r}. Use a date such as '2026-11-30'.") from None
    reserved = sorted(_TEMPLATE_ARGUMENTS & set(config.cdr_chat_template_kwargs or {}))
    if reserved:
        raise ConfigError(
            f"cdr_chat_template_kwargs has {reserved[0]!r}, which is not the template's to read: rendering sets it "
            "itself. Leave it out."
        )
    if config.cdr_chat_template is not None and not Path(config.cdr_chat_template).is_file():
        raise ConfigError(
            f"cdr_chat_template is {config.cdr_chat_template!r}, and no such file exists. Give the path of a file "
            "that holds a Jinja chat template."
        )


def parse_mapping(name: str, value: Any) -> Any:
    """
    A JSON string becomes the mapping that it spells; everything else stays, to be checked by type.

    Raises:
        ConfigError: it spells none.
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is {value!r}, which is no JSON ({error}). Write a JSON object.") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name} is {value!r}: it must spell a JSON object, such as '{{\"key\": 1}}'.")
    return parsed


def check_type(name: str, value: Any, hint: Any) -> None:
    """
    Whether a value is of its field's type.

    Raises:
        ConfigError: it is not.
    """
    choices = get_args(hint)
    if choices and isinstance(choices[0], str):  # Literal
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}. Use one of: {', '.join(choices)}.")
        return
    kinds = tuple(kind if isinstance(kind, type) else dict for kind in choices) or (hint,)
    is_bool = isinstance(value, bool)
    if not isinstance(value, (*kinds, int) if float in kinds else kinds) or is_bool != (hint is bool):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}). It takes {wanted}.")
