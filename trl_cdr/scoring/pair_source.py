"""A pair that is loaded when it is first asked for, and what can be known about it before.

Scorers share one and take turns at it. `pair_loading` loads.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import CDRConfig, is_served
from ..errors import ConfigError
from .encoding import PromptForm
from .offload import Turns
from .pair import Pair
from .pair_loading import load_pair
from .policy_base import PolicyBase
from .ranks import Ranks
from .sources import read_served


class PairSource:
    """
    A pair that is loaded when it is first asked for. Scorers that hold the same source share its models.

    Pickled without loaded models; what is pickled together stays shared.

    Args:
        config (`CDRConfig`): How to load and read.
        models (`dict[str, str | nn.Module]`): `strong` and `weak`: names, paths or loaded models.
        tokenizers (`dict`): `strong_tokenizer` and `weak_tokenizer`, each a tokenizer or `None`.

    Attributes:
        lock (`RLock`): Held by whoever uses the models.
        turns (`Turns`): Whose weights are awake, where `cdr_offload` puts them to sleep between calls.
        ranks (`Ranks`): The other processes, and whether this one holds the pair.
        form (`PromptForm`): How prompts are written. `today` is `cdr_date`, or the day on which the source was made.
    """

    def __init__(self, config: CDRConfig, models: dict[str, Any], tokenizers: dict[str, Any]) -> None:
        self.config = config
        self.form = PromptForm.of(config)
        self._dtype: str = config.cdr_dtype
        self.lock = threading.RLock()
        self.turns = Turns()
        self.ranks = Ranks(config.cdr_replicas)
        for role, model in models.items():
            if isinstance(model, nn.Module) and config.cdr_offload != "none":
                raise ConfigError(
                    f"offload is {config.cdr_offload!r}, and {role} is a loaded {type(model).__name__}: models that "
                    "are passed as objects are not moved. Pass its name or path, or leave offload out."
                )
            if isinstance(model, nn.Module) and config.cdr_replicas != "rank":
                raise ConfigError(
                    f"replicas is {config.cdr_replicas!r}, and {role} is a loaded {type(model).__name__}: what is "
                    "passed as an object is in every process. Pass its name or path, or leave replicas out."
                )
        self._models = models
        self._tokenizers = tokenizers
        self._pair: Pair | None = None
        self._policy: weakref.ref[nn.Module] | None = None
        self._base: PolicyBase | None = None  # of the policy, where the pair stands on it

    def use_policy(self, policy: nn.Module) -> None:
        """
        Say whose base the pair stands on, with `cdr_share_policy`; without it nothing happens.

        Args:
            policy (`nn.Module`): As the trainer has it, unwrapped; it is not kept alive.
        """
        if self.config.cdr_share_policy:
            with self.lock:
                self._policy = weakref.ref(policy)

    def use_form(self, form: PromptForm) -> None:
        """Write prompts in this form from now on."""
        with self.lock:
            if form != self.form and self._pair is not None:
                self._pair = self._pair.adapt(form)
            self.form = form

    def use_dtype(self, dtype: str) -> None:
        """Load the pair with this `cdr_dtype`. A loaded pair keeps its own."""
        with self.lock:
            self._dtype = dtype

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the models to this thread, for a call at whose end they may go to sleep."""
        with self.lock, self.turns.call():
            yield

    def get(self) -> Pair:
        """
        The pair; asked for within `use`.

        Raises:
            ConfigError: a model that was passed as an object did not survive pickling, with `cdr_share_policy` there is
                no policy, or none that can be shared, or this process is to hold no pair.
            ModelError: a model or tokenizer can't be loaded or can't serve.
        """
        with self.lock:
            self.ranks.check_holds()
            self._find_base()
            if self._pair is None:
                for role, model in self._models.items():
                    if model is None:
                        raise ConfigError(
                            f"{role} was a loaded model, and loaded models are not pickled. Build the scorer or reward "
                            "in the process that uses it, or pass a name or a path."
                        )
                self.turns.clear()  # of a pair of which one could not be loaded
                base = None if self._base is None else self._base.model
                config = self.config
                if self._dtype != config.cdr_dtype:
                    config = replace(config, cdr_dtype=self._dtype)  # type: ignore[arg-type]
                self._pair = load_pair(
                    config, **self._models, **self._tokenizers, base=base, turns=self.turns, form=self.form
                )
            return self._pair

    def _find_base(self) -> None:
        """See that the pair stands on the policy's base as it is now, where it is to stand there."""
        if not self.config.cdr_share_policy:
            return
        policy = None if self._policy is None else self._policy()
        if policy is None:
            raise ConfigError(
                "cdr_share_policy is set, and no policy is known. Pass CDRCallback(reward, trainer) to the trainer, or "
                "call reward.attach(trainer), before the first step."
            )
        if self._base is None or not self._base.is_of(policy):
            self._base, self._pair = PolicyBase(policy), None
        self._base.check()
        # Merging an adapter and taking it out again, as trainers do for vLLM, leaves a base with other roundings.
        lms = [] if self._pair is None else [self._pair.strong.local, self._pair.weak.local]
        if any(lm.keeps_prefixes for lm in lms) and self._base.has_changed():
            for lm in lms:
                lm.drop_prefixes()

    @property
    def held(self) -> list[nn.Module]:
        """The models that the caller holds and trains, maybe, himself."""
        return [model for model in self._models.values() if isinstance(model, nn.Module)]

    def unload(self) -> None:
        """Let go of the models and of all that is kept for them, an accelerator's cached memory too."""
        with self.lock:
            self._pair = self._base = None
            self.turns.clear()
            clear_device_cache(garbage_collection=True)

    def __getstate__(self) -> tuple[dict[str, Any], tuple[Any, ...]]:
        models = {role: None if isinstance(model, nn.Module) else model for role, model in self._models.items()}
        arguments = {"config": self.config, "models": models, "tokenizers": self._tokenizers}
        return arguments, (self.form, self._dtype)

    def __setstate__(self, state: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
        arguments, (form, dtype) = state
        self.__init__(**arguments)  # type: ignore[misc]
        self.form, self._dtype = form, dtype


def check_sources(
    strong: Any, weak: Any, strong_tokenizer: PreTrainedTokenizerBase | None, weak_tokenizer: Any
) -> None:
    """
    What can be known about a pair before anything is loaded.

    Raises:
        ConfigError: one is missing or of the wrong kind, both are one object, or a loaded model has no tokenizer.
    """
    for role, model, tokenizer in (("strong", strong, strong_tokenizer), ("weak", weak, weak_tokenizer)):
        if not isinstance(model, (str, Path, nn.Module)):
            raise ConfigError(f"{role} is {model!r}. Pass a model's name, a path or a loaded model.")
        if isinstance(model, str) and is_served(model):
            read_served(model, role)
        if isinstance(model, nn.Module) and tokenizer is None:
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__} and {role}_tokenizer is missing. Pass its tokenizer too."
            )
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"{role}_tokenizer is a {type(tokenizer).__name__}. Pass a transformers tokenizer.")
    if isinstance(strong, nn.Module) and isinstance(weak, nn.Module) and _parameters(strong) == _parameters(weak):
        raise ConfigError(
            f"strong and weak are one {type(strong).__name__}, or what peft put an adapter into and the result: they "
            "have the same parameters, and every log-ratio would be 0. Pass two models, or names and strong_adapter=."
        )


def _parameters(model: nn.Module) -> set[int]:
    return {id(one) for one in model.parameters()}


def check_adapters(models: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: an adapter is to be put on a model that was passed as an object, or such a model on the policy's
            base.
    """
    for role, model in models.items():
        if isinstance(model, nn.Module) and options.get("share_policy"):
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__}, and share_policy is set: the pair stands on the policy's "
                "base. Pass names, or leave out share_policy."
            )
        if isinstance(model, nn.Module) and options.get(f"{role}_adapter") is not None:
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__}, and {role}_adapter is {options[f'{role}_adapter']!r}: a "
                "model that you hold is used as it is. Pass its name, or put the adapter on it with peft."
            )
