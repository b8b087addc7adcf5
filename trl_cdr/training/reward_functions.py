"""A run's reward functions from its arguments: the objectives on the pair, and others by name.

`reward` is what an objective becomes; `train` hands the functions to the trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from ..config import PAIR_OPTIONS, CDRConfig
from ..errors import ConfigError
from .reward import CDRReward

_TRLS_OWN = "trl.rewards"


def make_rewards(
    cdr_args: CDRConfig,
    training_args: Any,
    *,
    objectives: Sequence[Mapping[str, Any]] = (),
    names: Sequence[str] = (),
) -> list[Any]:
    """
    The reward functions, in the order that `reward_weights` are read in: the objectives, then the others.

    Args:
        cdr_args (`CDRConfig`): The pair, and what the objectives leave open.
        training_args (`TrainingArguments`): The trainer's; see `CDRConfig.options`. Its `reward_weights` are checked.
        objectives (`Sequence[Mapping]`, *optional*): For each an own [`CDRReward`] on the one pair: options of
            [`CDRConfig`] without their prefix, a `name` among them. Without any, `cdr_args` is the one objective.
        names (`Sequence[str]`, *optional*): Others: dotted paths, and names of TRL's own (`trl.rewards`).

    Raises:
        ConfigError: an option is unknown or belongs to the pair, a function can't be found, two have one name, or
            there are not as many weights as functions.
    """
    configs = [_read_objective(index, entry, cdr_args) for index, entry in enumerate(objectives)] or [cdr_args]
    for index, config in enumerate(configs):
        if config.cdr_name in [other.cdr_name for other in configs[:index]]:
            raise ConfigError(
                f"cdr_objectives[{index}] is called {config.cdr_name!r}, as another is: their metrics would mix. Give "
                "each a name of its own."
            )
    first = CDRReward.from_config(configs[0], training_args)
    rewards: list[Any] = [first]
    for config in configs[1:]:
        options = config.options(training_args)
        rewards.append(CDRReward(share=first, **{name: options[name] for name in options if name not in PAIR_OPTIONS}))
    rewards += [find_reward(name) for name in names]
    _check_names([reward_name(reward) for reward in rewards], training_args.reward_weights)
    return rewards


def find_reward(name: str) -> Any:
    """
    A reward function by its dotted path, or by its name in `trl.rewards`.

    Raises:
        ConfigError: there is none, its module fails, or it makes a reward function in place of being one.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module or _TRLS_OWN), attribute)
    except Exception as error:  # a user's module may raise anything
        own = [known for known in dir(import_module(_TRLS_OWN)) if known.endswith("_reward") and known[:4] != "get_"]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"reward_funcs has {name!r}, which can't be imported ({reason}). Give the dotted path of a function, or "
            f"one of TRL's own: {', '.join(own)}."
        ) from error
    is_factory = attribute.startswith("get_") and found.__module__.startswith(_TRLS_OWN)
    if is_factory or isinstance(found, type) or not callable(found):
        raise ConfigError(
            f"reward_funcs has {name!r}, which is no reward function, though it may make one. Call it in a module of "
            "your own, and give the dotted path of the result."
        )
    return found


def reward_name(reward: Any) -> str:
    """What a reward function is called in the trainer's logs."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def _read_objective(index: int, entry: Mapping[str, Any], common: CDRConfig) -> CDRConfig:
    """An objective's options: its own, else those of the whole run."""
    known = [field.name.removeprefix("cdr_") for field in fields(CDRConfig)]
    own = [name for name in known if name not in PAIR_OPTIONS]
    for name in entry:
        if name in PAIR_OPTIONS:
            raise ConfigError(
                f"cdr_objectives[{index}] has {name!r}, which is the pair's, and all objectives share one. Write "
                f"cdr_{name} beside cdr_objectives."
            )
        if name not in own:
            raise ConfigError(f"cdr_objectives[{index}] has {name!r}, which is no option. Options: {', '.join(own)}.")
    try:
        return replace(common, **{f"cdr_{name}": value for name, value in entry.items()})
    except ConfigError as error:
        raise ConfigError(f"cdr_objectives[{index}]: {error}") from None


def _check_names(names: Sequence[str], weights: Any) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"two reward functions are called {name}: their metrics would mix. Rename one.")
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(names)):
        raise ConfigError(
            f"reward_weights is {weights!r}, and there are {len(names)} reward functions. Give a list with one number "
            f"for each, in this order: {', '.join(names)}."
        )
