"""Environment variables -> the reward that `trl grpo` and `trl rloo` import by name. `reward` does the work.

TRL's own scripts take a reward as a dotted path and pass it no options, but their YAML has a block `env`:

    reward_funcs: trl_cdr.cdr_reward
    env:
      CDR_STRONG: NousResearch/Nous-Hermes-2-Mistral-7B-DPO
      CDR_WEAK: teknium/OpenHermes-2.5-Mistral-7B
"""

import argparse
import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from .. import _compat
from ..config import CDRConfig
from ..errors import ConfigError
from ..scoring.types import Message, Prompt
from .reward import CDRReward

_PREFIX = "CDR_"


class EnvironmentReward:
    """
    A [`CDRReward`] whose options are environment variables: the fields of [`CDRConfig`] in capitals, `CDR_STRONG` and
    `CDR_WEAK` at least. What is unset or empty has its default, which may follow the trainer's arguments.

    The environment is read at the first call. Can be pickled; a copy reads the environment of its own process.

    Attributes:
        reward (`CDRReward` or `None`): What does the work, from the first call on.
    """

    def __init__(self) -> None:
        self.reward: CDRReward | None = None
        self._lock = threading.Lock()

    @property
    def __name__(self) -> str:
        return f"{os.environ.get('CDR_NAME') or CDRConfig.cdr_name}_reward"

    @property
    def _cdr_reward(self) -> CDRReward | None:
        """What `_compat.cdr_reward` knows it by."""
        return self.reward

    def __reduce__(self) -> tuple[type["EnvironmentReward"], tuple[()]]:
        return EnvironmentReward, ()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Reward each completion, as `CDRReward.__call__` does.

        Raises:
            ConfigError: `CDR_STRONG` or `CDR_WEAK` is not set, or a variable `CDR_...` is unknown or not allowed.
        """
        with self._lock:
            if self.reward is None:
                args = getattr(_compat.trainer_behind(log_metric), "args", None)
                self.reward = CDRReward.from_config(read_environment(os.environ), args)
        return self.reward(prompts, completions, completion_ids, log_metric=log_metric, **columns)


def read_environment(environment: Mapping[str, str]) -> CDRConfig:
    """
    Read the options from variables `CDR_...`, typed as the fields of [`CDRConfig`] are on the command line.

    Args:
        environment (`Mapping[str, str]`): Variables. Those with another prefix are not looked at.

    Raises:
        ConfigError: `CDR_STRONG` or `CDR_WEAK` is not set, or a variable `CDR_...` is unknown or not allowed.
    """
    known = [field.name.upper() for field in dataclasses.fields(CDRConfig)]
    given = {name: value for name, value in environment.items() if name.startswith(_PREFIX) and value.strip()}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{unknown[0]} is set and is no option. Unset it, or use one of: {', '.join(known)}.")
    for name in ("CDR_STRONG", "CDR_WEAK"):
        if name not in given:
            raise ConfigError(
                f"{name} is not set: trl_cdr.cdr_reward takes its options from the environment. Set it in the shell or "
                "in the block env of the YAML."
            )
    parser = HfArgumentParser(CDRConfig, exit_on_error=False)
    arguments = [f"--{name.lower()}={value}" for name, value in given.items()]
    try:
        [config] = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (argparse.ArgumentError, ConfigError) as error:
        raise ConfigError(f"In the environment: {error}") from None
    return config  # type: ignore[no-any-return]


cdr_reward = EnvironmentReward()
"""For `reward_funcs: trl_cdr.cdr_reward`."""
