"""Every knob, as one dataclass that TrlParser reads beside any trainer's config. Imports no torch and loads nothing.

Neighbours: `scoring.scorer` and `training.reward` take the same options as keyword arguments without the prefix.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from .errors import ConfigError

_PREFIX = "cdr_"
PAIR_OPTIONS = (
    "strong",
    "weak",
    "strong_revision",
    "weak_revision",
    "strong_adapter",
    "weak_adapter",
    "strong_adapter_revision",
    "weak_adapter_revision",
    "share_policy",
    "dtype",
    "device",
    "model_init_kwargs",
    "chat_template",
    "chat_template_kwargs",
    "add_special_tokens",
    "max_length",
    "prefix_cache_tokens",
    "offload",
    "replicas",
)
"""The options, without prefix, that say what the pair is and how it reads. Scorers that share a pair share these."""

_TYPICALITY = 1.5  # below minus this, in standard deviations per token, a completion is not typical

# Of `from_pretrained`: whose machine it is and who asks, not which models.
_LOCAL_ARGUMENTS = {"token", "cache_dir", "local_files_only"}
# Of `from_pretrained`: weights under these can't be moved.
_FIXED_WEIGHTS = ("quantization_config", "load_in_8bit", "load_in_4bit", "device_map")
_SERVERS = ("vllm://", "vllm+https://")
# Of `apply_chat_template`, and ours to set.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
}


@dataclass
class CDRConfig:
    """
    Options of the density-ratio reward. On the command line and in YAML every name keeps its prefix (`--cdr_strong`);
    as keyword arguments of [`CDRReward`] and [`DensityRatioScorer`] the prefix is dropped (`strong=`); as environment
    variables of `trl_cdr.cdr_reward` they are in capitals (`CDR_STRONG`).

    Types and choices are checked here, because TrlParser does not check values that come from YAML.

    Raises:
        ConfigError: a value has the wrong type, is not among its choices or is out of range.

    Example:

    ```python
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser
    from trl_cdr import CDRConfig, CDRReward

    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, CDRConfig))
    script_args, training_args, model_args, cdr_args = parser.parse_args_and_config()
    reward = CDRReward.from_config(cdr_args, training_args)
    ```
    """

    cdr_strong: str = field(metadata={"help": "Better aligned model: a name, a path, or vllm://HOST:PORT/MODEL."})
    cdr_weak: str = field(metadata={"help": "Less aligned model, likewise."})
    cdr_strong_revision: str | None = field(
        default=None, metadata={"help": "Revision (branch, tag, commit) of the strong model."}
    )
    cdr_weak_revision: str | None = field(
        default=None, metadata={"help": "Revision (branch, tag, commit) of the weak model."}
    )
    cdr_strong_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter on cdr_strong, its base: a PEFT folder or a name on the Hub. One base is held once."
        },
    )
    cdr_weak_adapter: str | None = field(
        default=None, metadata={"help": "Adapter on cdr_weak. Default: the base itself."}
    )
    cdr_strong_adapter_revision: str | None = field(
        default=None, metadata={"help": "Revision of the strong model's adapter."}
    )
    cdr_weak_adapter_revision: str | None = field(
        default=None, metadata={"help": "Revision of the weak model's adapter."}
    )
    cdr_share_policy: bool = field(
        default=False,
        metadata={"help": "The policy trains an adapter on the pair's base: hold it once for all."},
    )
    cdr_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Type of the pair's weights. auto: bfloat16 where the trainer has bf16, else the checkpoint's; "
            "float32 on CPU."
        },
    )
    cdr_device: str = field(
        default="auto", metadata={"help": "Device of the pair, such as cuda:1. auto: the process's own."}
    )
    cdr_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained, a mapping or a JSON string."},
    )
    cdr_reduction: Literal["sum", "mean"] = field(
        default="sum",
        metadata={
            "help": "sum: log-ratio of the whole completion (comparable between tokenizers). mean: each model's sum "
            "divided by its own count of completion tokens."
        },
    )
    cdr_chat_template: str | None = field(
        default=None, metadata={"help": "Path of a Jinja chat template that both models use in place of their own."}
    )
    cdr_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables for the chat template (enable_thinking, ...), a mapping or a JSON string."},
    )
    cdr_policy_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Name or path of the policy's tokenizer. Tells finished completions from cut-off ones."},
    )
    cdr_add_special_tokens: Literal["auto", "true", "false"] = field(
        default="auto",
        metadata={
            "help": "BOS before string prompts. auto: where the tokenizer adds one by default, as GRPO and RLOO do; "
            "false: never, as online DPO does. Conversations take it from the chat template."
        },
    )
    cdr_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt + completion, in tokens. Default: the model's number of positions."},
    )
    cdr_token_budget: int = field(
        default=8192, metadata={"help": "Tokens of one forward, padding too; halved if memory runs out."}
    )
    cdr_gate: Literal["surprise", "typicality", "none"] = field(
        default="surprise",
        metadata={
            "help": "What stands between the log-ratio and the reward. surprise: completions lose by what the strong "
            "model would hardly have written, and gain nothing where it would not; typicality: min(log-ratio, 0) - 1 "
            "where it is unlikelier than its own on average; none: the paper's plain ratio."
        },
    )
    cdr_typicality: float | None = field(
        default=None,
        metadata={"help": "Deprecated: cdr_gate says it. The bound of its typicality."},
    )
    cdr_on_unscorable: Literal["auto", "floor", "none", "raise"] = field(
        default="auto",
        metadata={
            "help": "Reward of a completion that can't be scored. auto: none where the trainer leaves it out, floor "
            "where it would read None as 0; floor: the call's worst finite reward minus 1 nat, -1 if there is none; "
            "none: None; raise: stop."
        },
    )
    cdr_on_gaming: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={
            "help": "What CDRCallback does where the policy games the reward. warn: say so; stop: also save a "
            "checkpoint and end; off: nothing."
        },
    )
    cdr_name: str = field(
        default="cdr",
        metadata={"help": "Its function is <name>_reward, its metrics <name>/..."},
    )
    cdr_prefix_cache_tokens: int = field(
        default=8192,
        metadata={"help": "Tokens of criteria whose keys and values each model keeps between calls. 0: none."},
    )
    cdr_criteria: str | None = field(
        default=None,
        metadata={
            "help": "What a good completion is, by domain: a TOML file, a preset (safety, reasoning, chat), or several "
            "of these joined by +. Default: the plain ratio."
        },
    )
    cdr_domain: str | None = field(default=None, metadata={"help": "The domain of every prompt."})
    cdr_router: str | None = field(
        default=None,
        metadata={
            "help": "How each prompt's domain is found. column:NAME: the data set says; likelihood: the strong model "
            "classifies; a dotted path: a function of the prompt."
        },
    )
    cdr_num_exemplars: int = field(default=2, metadata={"help": "Exemplars of a domain that are shown to the pair."})
    cdr_exemplar_style: Literal["inline", "turns"] = field(
        default="inline",
        metadata={
            "help": "inline: good, bad and why as text below the instruction; turns: prompt and good completion as "
            "turns before the conversation."
        },
    )
    cdr_offload: Literal["none", "cpu", "disk"] = field(
        default="none",
        metadata={
            "help": "Where strong and weak, awake in turns, sleep between calls. none: they stay awake; cpu: the "
            "host's memory; disk: their checkpoints."
        },
    )
    cdr_replicas: Literal["rank", "node"] = field(
        default="rank",
        metadata={"help": "Who holds the pair. rank: each process; node: one a machine."},
    )
    cdr_seed: int = field(
        default=0,
        metadata={"help": "Seed of what is drawn: a domain's exemplars, and the tokens of the load-time check."},
    )

    def __post_init__(self) -> None:
        self.cdr_model_init_kwargs = _parse_mapping("cdr_model_init_kwargs", self.cdr_model_init_kwargs)
        self.cdr_chat_template_kwargs = _parse_mapping("cdr_chat_template_kwargs", self.cdr_chat_template_kwargs)
        if isinstance(self.cdr_add_special_tokens, bool):  # YAML reads a bare true as a boolean
            self.cdr_add_special_tokens = "true" if self.cdr_add_special_tokens else "false"
        if isinstance(self.cdr_on_gaming, bool) and not self.cdr_on_gaming:  # and a bare off as one
            self.cdr_on_gaming = "off"
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name in ("cdr_strong", "cdr_weak", "cdr_strong_adapter", "cdr_weak_adapter", "cdr_device"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty. Give a name or a path.")
        for name in ("cdr_strong_adapter", "cdr_weak_adapter"):
            revision = getattr(self, f"{name}_revision")
            if revision is not None and getattr(self, name) is None:
                raise ConfigError(
                    f"{name}_revision is {revision!r} and {name} is missing. Pass the adapter; of one that stands in "
                    f"the place of its model the revision is {name.removesuffix('_adapter')}_revision."
                )
        if self.cdr_share_policy and self.cdr_offload != "none":
            raise ConfigError(
                f"cdr_share_policy is set and cdr_offload is {self.cdr_offload!r}: the pair stands on weights that the "
                "policy trains on, and those stay where they are. Leave out one of the two."
            )
        if self.cdr_share_policy and self.cdr_replicas != "rank":
            raise ConfigError(
                f"cdr_share_policy is set and cdr_replicas is {self.cdr_replicas!r}: the pair stands on the policy's "
                "base, which is in every process. Leave out one of the two."
            )
        if not self.cdr_name.isidentifier():
            raise ConfigError(
                f"cdr_name is {self.cdr_name!r}: it becomes part of a function's name. Use letters, digits and _."
            )
        if self.cdr_token_budget < 1:
            raise ConfigError(f"cdr_token_budget is {self.cdr_token_budget}: it counts tokens. Use 1 or more.")
        if self.cdr_prefix_cache_tokens < 0:
            raise ConfigError(
                f"cdr_prefix_cache_tokens is {self.cdr_prefix_cache_tokens}: it counts tokens. Use 0 or more."
            )
        fixed = [name for name in _FIXED_WEIGHTS if name in (self.cdr_model_init_kwargs or {})]
        if self.cdr_offload != "none" and fixed:
            raise ConfigError(
                f"cdr_offload is {self.cdr_offload!r}, and cdr_model_init_kwargs has {fixed[0]!r}: weights that are "
                "quantised or spread over devices can't be moved. Leave out one of the two."
            )
        if self.cdr_typicality is not None:
            self._read_typicality(self.cdr_typicality)
        self._check_served()
        if self.cdr_num_exemplars < 0:
            raise ConfigError(f"cdr_num_exemplars is {self.cdr_num_exemplars}: it counts exemplars. Use 0 or more.")
        if self.cdr_criteria is None:
            for name in ("cdr_domain", "cdr_router"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r} and cdr_criteria is missing: a domain selects criteria. "
                        f"Pass cdr_criteria, or leave {name} out."
                    )
        if self.cdr_max_length is not None and self.cdr_max_length < 2:
            raise ConfigError(
                f"cdr_max_length is {self.cdr_max_length}: a row has at least one prompt and one completion token. "
                "Use 2 or more, or leave it out for the model's number of positions."
            )
        reserved = sorted(_TEMPLATE_ARGUMENTS & set(self.cdr_chat_template_kwargs or {}))
        if reserved:
            raise ConfigError(
                f"cdr_chat_template_kwargs has {reserved[0]!r}, which is not the template's to read: rendering sets it "
                "itself. Leave it out."
            )
        if self.cdr_chat_template is not None and not Path(self.cdr_chat_template).is_file():
            raise ConfigError(
                f"cdr_chat_template is {self.cdr_chat_template!r}, and no such file exists. Give the path of a file "
                "that holds a Jinja chat template."
            )

    @property
    def typicality_bound(self) -> float:
        """Below minus this the gate typicality closes, in standard deviations per token."""
        return _TYPICALITY if self.cdr_typicality is None else self.cdr_typicality

    @property
    def served(self) -> list[str]:
        """Those of strong and weak that are on servers."""
        return [role for role in ("strong", "weak") if is_served(getattr(self, f"cdr_{role}"))]

    def _check_served(self) -> None:
        """What can't be asked of a model that is on a server."""
        served = self.served
        for role in served:
            for name in (f"cdr_{role}_revision", f"cdr_{role}_adapter"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, and cdr_{role} is on a server, which serves what it was "
                        f"started with. Leave it out, and start the server with it (--revision, --lora-modules)."
                    )
        if served and self.cdr_share_policy:
            raise ConfigError(
                f"cdr_share_policy is set, and cdr_{served[0]} is on a server: the policy's base is here. Leave out "
                "cdr_share_policy, or name the base."
            )
        if "strong" in served and self.cdr_gate != "none":
            raise ConfigError(
                f"cdr_gate is {self.cdr_gate!r} (where it is left out, too), and cdr_strong is on a server: the gate "
                "needs the strong model's whole distribution at every token, and a server gives the log-probabilities "
                "of the tokens alone. Write cdr_gate='none', the paper's plain ratio, and watch the run; or load "
                "strong here, beside which weak may stay on its server."
            )
        if len(served) == 2:
            for name in ("cdr_dtype", "cdr_device", "cdr_offload"):
                if getattr(self, name) != getattr(CDRConfig, name):
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, and strong and weak are on servers: nothing of them is "
                        f"here. Leave it out, and start the servers as they are to run (--dtype)."
                    )
            others = sorted(set(self.cdr_model_init_kwargs or {}) - _LOCAL_ARGUMENTS)
            if others:
                raise ConfigError(
                    f"cdr_model_init_kwargs has {others[0]!r}, and strong and weak are on servers: only their "
                    "tokenizers are loaded here. Leave it out, and start the servers as they are to run."
                )

    def _read_typicality(self, bound: float) -> None:
        """What `cdr_typicality` says of the gate: drop it with the next release."""
        if not bound > 0:
            raise ConfigError(
                f"cdr_typicality is {bound}: it counts standard deviations below the strong model's own samples. Leave "
                f"it out for {_TYPICALITY}, or pass cdr_gate='none' for no gate."
            )
        gate: Literal["typicality", "none"] = "none" if bound == math.inf else "typicality"
        if self.cdr_gate not in (gate, CDRConfig.cdr_gate):
            raise ConfigError(
                f"cdr_gate is {self.cdr_gate!r}, and cdr_typicality={bound} asks for {gate!r}. Leave the latter out."
            )
        warnings.warn(
            f"cdr_typicality is deprecated. In place of cdr_typicality={bound} write cdr_gate={gate!r}"
            + (f", whose bound is {_TYPICALITY}." if gate == "typicality" else "."),
            FutureWarning,
            stacklevel=4,  # __post_init__, __init__, whoever builds the config
        )
        self.cdr_gate = gate
        if gate == "none":  # so that it is said once: copies of a config are built anew
            self.cdr_typicality = None

    @classmethod
    def from_options(cls, **options: Any) -> "CDRConfig":
        """
        Build a config from keyword arguments without the prefix.

        Args:
            **options: Field names without `cdr_`, with their values.

        Raises:
            ConfigError: an option is unknown, or its value is not allowed.
        """
        known = [f.name.removeprefix(_PREFIX) for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            hint = " Leave out the prefix cdr_." if any(name.startswith(_PREFIX) for name in unknown) else ""
            raise ConfigError(f"{unknown[0]!r} is no option.{hint} Options: {', '.join(known)}.")
        return cls(**{_PREFIX + name: value for name, value in options.items()})

    def options(self, args: Any = None) -> dict[str, Any]:
        """
        The fields as keyword arguments, without the prefix.

        Args:
            args (`TrainingArguments`, *optional*): The trainer's, for what is left at its default: `cdr_seed=0` is its
                `seed`; `cdr_dtype="auto"` is bfloat16 where the trainer computes in it (`bf16`), the pair sits on the
                trainer's kind of device and that is no CPU, where "auto" stays float32: bfloat16 is slow there. fp16
                changes nothing, since the range of float16 is too small for many checkpoints. With
                `cdr_share_policy` "auto" is the policy's, on servers theirs.
        """
        options = {f.name.removeprefix(_PREFIX): getattr(self, f.name) for f in fields(self)}
        if args is not None and self.cdr_seed == CDRConfig.cdr_seed:
            options["seed"] = args.seed
        has_weights = not self.cdr_share_policy and len(self.served) < 2
        if args is not None and self.cdr_dtype == "auto" and args.bf16 and has_weights:
            device = args.device.type if self.cdr_device == "auto" else self.cdr_device.split(":")[0]
            if device == args.device.type != "cpu":
                options["dtype"] = "bfloat16"
        return options


def is_served(name: str) -> bool:
    """Whether the name of a model is the address of a server."""
    return name.startswith(_SERVERS)


def shareable_options(config: CDRConfig | Mapping[str, Any]) -> dict[str, Any]:
    """
    The options as JSON takes them and everyone may read them, to be stored beside what they made.

    Args:
        config (`CDRConfig` or `Mapping`): A config, or what was stored of one, with anything else beside it.

    Returns:
        `dict`: under the same names; `cdr_model_init_kwargs` without `token`, `cache_dir` and `local_files_only`, and
        None where it has nothing else. What JSON has no word for (inf, NaN, objects) is its `str`.
    """
    shared: dict[str, Any] = _as_json(config if isinstance(config, Mapping) else vars(config))
    kwargs = shared.get("cdr_model_init_kwargs")
    if isinstance(kwargs, dict):
        kept = {name: value for name, value in kwargs.items() if name not in _LOCAL_ARGUMENTS}
        shared["cdr_model_init_kwargs"] = kept or None
    return shared


def shareable_name(name: str) -> str:
    """A name as everyone may read it: of a path of this machine the last part."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _parse_mapping(name: str, value: Any) -> Any:
    """A JSON string becomes the mapping that it spells; everything else stays, to be checked by type."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is {value!r}, which is no JSON ({error}). Write a JSON object.") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name} is {value!r}: it must spell a JSON object, such as '{{\"key\": 1}}'.")
    return parsed


def _check_type(name: str, value: Any, hint: Any) -> None:
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
