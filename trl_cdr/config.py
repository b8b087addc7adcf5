"""Every knob, as one dataclass that TrlParser reads beside any trainer's config. Imports no torch and loads nothing.

Neighbours: `scoring.scorer` and `training.reward` take the same options as keyword arguments without the prefix.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_type_hints

from .config_checks import LOCAL_ARGUMENTS, check_type, check_values, parse_mapping
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
    "string_prompts",
    "date",
    "add_special_tokens",
    "max_length",
    "prefix_cache_tokens",
    "offload",
    "replicas",
)
"""The options, without prefix, that say what the pair is and how it reads. Scorers that share a pair share these."""

_TYPICALITY = 1.5  # below minus this, in standard deviations per token, a completion is not typical

_SERVERS = ("vllm://", "vllm+https://")


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
        metadata={
            "help": "Variables for the chat template (enable_thinking, ...), a mapping or a JSON string. Default: the "
            "trainer's."
        },
    )
    cdr_string_prompts: Literal["auto", "user", "text"] = field(
        default="auto",
        metadata={
            "help": "Read a prompt that is a string as a user's turn (user) or as raw text (text). auto: text in a "
            "trainer, else user if there is a chat template."
        },
    )
    cdr_date: str | None = field(
        default=None,
        metadata={
            "help": "Date (YYYY-MM-DD) for chat templates that write today's. Default: the day on which the run began."
        },
    )
    cdr_policy_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Name or path of the policy's tokenizer. Tells finished completions from cut-off ones."},
    )
    cdr_add_special_tokens: Literal["auto", "true", "false"] = field(
        default="auto",
        metadata={
            "help": "BOS before string prompts. auto: if the tokenizer adds one by default, as in GRPO and RLOO; in "
            "online DPO none, as for its policy. Conversations take it from the chat template."
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
            "where it would read None as 0; floor: the worst reward of the prompt's completions minus 1 nat; "
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
        self.cdr_model_init_kwargs = parse_mapping("cdr_model_init_kwargs", self.cdr_model_init_kwargs)
        self.cdr_chat_template_kwargs = parse_mapping("cdr_chat_template_kwargs", self.cdr_chat_template_kwargs)
        if isinstance(self.cdr_add_special_tokens, bool):  # YAML reads a bare true as a boolean
            self.cdr_add_special_tokens = "true" if self.cdr_add_special_tokens else "false"
        if isinstance(self.cdr_on_gaming, bool) and not self.cdr_on_gaming:  # and a bare off as one
            self.cdr_on_gaming = "off"
        for name, hint in get_type_hints(type(self)).items():
            check_type(name, getattr(self, name), hint)
        if self.cdr_typicality is not None:
            self._read_typicality(self.cdr_typicality)
        check_values(self)

    @property
    def typicality_bound(self) -> float:
        """Below minus this the gate typicality closes, in standard deviations per token."""
        return _TYPICALITY if self.cdr_typicality is None else self.cdr_typicality

    @property
    def served(self) -> list[str]:
        """Those of strong and weak that are on servers."""
        return [role for role in ("strong", "weak") if is_served(getattr(self, f"cdr_{role}"))]

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
                `cdr_share_policy` "auto" is the policy's, on servers theirs. `cdr_chat_template_kwargs=None` is the
                trainer's `chat_template_kwargs`.

        Raises:
            ConfigError: `cdr_chat_template_kwargs` and the trainer's `chat_template_kwargs` differ.
        """
        options = {f.name.removeprefix(_PREFIX): getattr(self, f.name) for f in fields(self)}
        if args is not None and self.cdr_seed == CDRConfig.cdr_seed:
            options["seed"] = args.seed
        options["chat_template_kwargs"] = choose_template_kwargs(
            self.cdr_chat_template_kwargs,  # type: ignore[arg-type]
            getattr(args, "chat_template_kwargs", None),
        )
        options["dtype"] = self.choose_dtype(args)
        return options

    def choose_dtype(self, args: Any) -> str:
        """
        Return `cdr_dtype` for a pair in a trainer; see `options`.

        Args:
            args (`TrainingArguments` or `None`): The trainer's.
        """
        has_weights = not self.cdr_share_policy and len(self.served) < 2
        if args is not None and self.cdr_dtype == "auto" and args.bf16 and has_weights:
            device = args.device.type if self.cdr_device == "auto" else self.cdr_device.split(":")[0]
            if device == args.device.type != "cpu":
                return "bfloat16"
        return self.cdr_dtype


def choose_template_kwargs(own: Mapping[str, Any] | None, trainers: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """
    Return the variables with which the pair's chat templates are rendered.

    Args:
        own (`Mapping` or `None`): `cdr_chat_template_kwargs`.
        trainers (`Mapping` or `None`): The trainer's `chat_template_kwargs`, with which the policy's prompts are
            rendered.

    Raises:
        ConfigError: both are set and differ.
    """
    if own and trainers and dict(own) != dict(trainers):
        raise ConfigError(
            f"cdr_chat_template_kwargs is {dict(own)}, and the trainer's chat_template_kwargs is {dict(trainers)}. The "
            "pair would score another prompt than the policy reads. Leave out cdr_chat_template_kwargs, or make them "
            "equal."
        )
    return dict(own or trainers or {}) or None


def with_date(config: CDRConfig, today: str | None = None) -> CDRConfig:
    """
    Return the options with a date for chat templates that write today's.

    Args:
        config (`CDRConfig`): Returned unchanged if it has a date.
        today (`str`, *optional*): The date, as `YYYY-MM-DD`. Default: the clock's.
    """
    if config.cdr_date is not None:
        return config
    dated = copy.copy(config)
    dated.cdr_date = today or date.today().isoformat()
    return dated


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
        kept = {name: value for name, value in kwargs.items() if name not in LOCAL_ARGUMENTS}
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
