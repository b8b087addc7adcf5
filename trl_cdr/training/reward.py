"""Score -> TRL's reward-function contract. Touches no model; `scoring.scorer` does, and `scoring.rewards`."""

import asyncio
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import _compat
from ..conditioning.criteria import Criteria
from ..config import CDRConfig
from ..errors import ConfigError
from ..scoring.rewards import rewards_from_scores
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from ..scoring.together import score_together
from ..scoring.types import Message, Prompt
from .checks import compare_prompts
from .metrics import Call, call_metrics
from .metrics_callback import MetricsCallback, insert_before_integrations
from .provenance import ProvenanceCallback
from .trainer_setup import set_up

logger = logging.getLogger(__name__)

_MAY_WAIT = ContextVar("whether a call may wait for other processes", default=True)


class CDRReward:
    """
    A reward function for TRL's trainers: the log-density ratio of a strong over a weak model, in nats.

    What the strong model would hardly have written itself is gated (`gate="surprise"`; `"none"` is the paper's plain
    ratio): a policy that writes what neither model knows finds no reward there.

    Pass it as `reward_funcs=` to `OnlineDPOTrainer`, `GRPOTrainer` or `RLOOTrainer`. The pair is loaded inside the
    first call, on the trainer process's own device, and stays there, or sleeps between calls (`offload`).

    Args:
        strong, weak (`str` or `nn.Module`): Better and less aligned model: a name, a path, the address of vLLM servers
            (`vllm://HOST:PORT/MODEL`), or a loaded model, which is used as it is and never changed.
        strong_tokenizer, weak_tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed with a loaded model.
        criteria, router (*optional*): What a good completion is in each domain, and how a prompt's domain is found; see
            [`DensityRatioScorer`]. With `router="column:NAME"` the data set's column says.
        share (`CDRReward`, *optional*): Another reward whose models this one uses, in place of `strong` and `weak`: two
            objectives with one pair in memory. Give it a `name` of its own.
        **options: The other fields of [`CDRConfig`] without their prefix.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed.

    Example:

    ```python
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl_cdr import CDRReward

    reward = CDRReward(
        strong="NousResearch/Nous-Hermes-2-Mistral-7B-DPO", weak="teknium/OpenHermes-2.5-Mistral-7B", dtype="bfloat16"
    )
    trainer = OnlineDPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    ```
    """

    def __init__(
        self,
        strong: str | nn.Module | None = None,
        weak: str | nn.Module | None = None,
        *,
        strong_tokenizer: PreTrainedTokenizerBase | None = None,
        weak_tokenizer: PreTrainedTokenizerBase | None = None,
        criteria: str | Path | Criteria | None = None,
        router: str | Callable[[Prompt], str] | None = None,
        share: "CDRReward | None" = None,
        **options: Any,
    ) -> None:
        if not isinstance(share, CDRReward | None):
            raise ConfigError(f"share is a {type(share).__name__}. Pass the CDRReward whose pair is to be shared.")
        self.scorer: DensityRatioScorer = DensityRatioScorer(
            strong,
            weak,
            strong_tokenizer=strong_tokenizer,
            weak_tokenizer=weak_tokenizer,
            criteria=criteria,
            router=router,
            share=None if share is None else share.scorer,
            **options,
        )
        if share is not None and share.config.cdr_name == self.config.cdr_name:
            raise ConfigError(
                f"name is {self.config.cdr_name!r}, and so is that of the reward that shares its pair: their metrics "
                "would mix. Pass another name."
            )
        if self.scorer.router is not None and self.scorer.router.is_undecided:
            domains = ", ".join(self.scorer.router.domains)
            raise ConfigError(
                f"criteria has several domains ({domains}), and nothing selects one. Pass router or domain."
            )
        self._observers: list[Callable[[], Callable[[Call], None] | None]] = []
        self._has_warned = self._has_compared = False
        self._trainer: weakref.ref[Any] | None = None
        self._metrics: weakref.ref[MetricsCallback] | None = None
        # TRL < 1.9 reads __name__ unguarded, and every version shows it in its logs (trl#6313).
        self.__name__ = f"{self.config.cdr_name}_reward"

    @classmethod
    def from_config(cls, config: CDRConfig, args: Any = None) -> "CDRReward":
        """
        Build from a parsed [`CDRConfig`].

        Args:
            config (`CDRConfig`): Every option; both models by name or path.
            args (`TrainingArguments`, *optional*): The trainer's, for defaults that the config leaves open: see
                `CDRConfig.options`.
        """
        return cls(**config.options(args))

    @property
    def config(self) -> CDRConfig:
        """The options in force."""
        return self.scorer.config

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,  # TRL's contract: data set columns, trainer_state, environments, ...
    ) -> list[float | None]:
        """
        Reward each completion, as TRL calls it.

        Args:
            prompts, completions (`Sequence`): Strings or conversations, as many of one as of the other.
            completion_ids (`Sequence[Sequence[int]]`, *optional*): The policy's token ids, padded or not.
            log_metric (`Callable`, *optional*): GRPO's and RLOO's, from which the trainer is known: its logs get the
                metrics, see `MetricsCallback`. Any other function receives the call's metrics as `<name>/...`, see
                `call_metrics`.
            log_extra (`Callable`, *optional*): GRPO's and RLOO's; receives `<name>_strong_logps`, `<name>_weak_logps`,
                `<name>_tokens` and `<name>_gated` of each completion, for the completions table.
            **columns: What else the trainer hands over. `router="column:NAME"` reads the domains from here.

        Returns:
            `list[float | None]`: one finite reward for each completion, in nats; `None` for one that can't be scored,
            where `cdr_on_unscorable="none"` asks for it, or `"auto"` knows from `log_metric` that the trainer leaves
            such a completion out: `OnlinePreferenceTrainer`, and GRPO and RLOO from TRL 1.6 without a second reward
            function. Every other caller gets the floor: 1 nat below the worst reward of the same prompt's completions,
            on all processes. A trainer that is not known can't be told from you.

        Raises:
            UnscorableError: a row can't be scored and `cdr_on_unscorable="raise"`.
            InputError: the router's column is missing, or the data set of GRPO or RLOO names an unknown domain in it;
                see also `DensityRatioScorer.score`.
            ConfigError: another reward of GRPO or RLOO has this name; see also `DensityRatioScorer.score`.
            ModelError: in a trainer's first call, the pair has other weights in another process; see also
                `DensityRatioScorer.score`.
        """
        trainer = _compat.trainer_behind(log_metric)
        if trainer is not None:
            self.use_trainer(trainer)
        elif "trainer_state" in columns and log_metric is None:  # of TRL's trainers only online DPO
            self._follow_online_dpo(columns.get("chat_template_kwargs"))
        started, moved = time.perf_counter(), self.scorer.moving_seconds
        domains = None if self.scorer.router is None else self.scorer.router.read_column(columns)
        is_trainers = trainer is not None or "trainer_state" in columns  # then every process calls
        if is_trainers:
            self._compare_prompts(prompts)
        score = partial(score_together, self.scorer) if is_trainers else self.scorer.score
        scores = score(prompts, completions, completion_ids=completion_ids, domains=domains)
        self._warn(scores)
        # A process that holds a part of a group asks the others for the rest.
        is_split = self._is_asked(trainer) and _compat.splits_groups(trainer, len(prompts))
        rewards = rewards_from_scores(
            scores,
            on_unscorable=self._on_unscorable(trainer),
            reduction=self.config.cdr_reduction,
            groups=[repr(prompt) for prompt in prompts],
            lowest=self.scorer.ranks.lowest if is_split and _MAY_WAIT.get() else dict,
        )
        if scores:
            tokens = completion_ids if completion_ids is not None else [str(said).split() for said in completions]
            moving = None if moved is None else (self.scorer.moving_seconds or 0.0) - moved
            call = Call(prompts, completions, list(tokens), scores, rewards, time.perf_counter() - started, moving)
            self._report(call, log_metric, log_extra, is_trainers=is_trainers)
        return rewards

    @property
    def awaitable(self) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
        """
        This reward as a function to be awaited. GRPO, RLOO and `OnlinePreferenceTrainer` run several of these at once,
        after those that are not: it is for a pair that is on servers, beside other rewards that wait for something.
        Calls in which processes wait for one another (the first one, and all with `replicas="node"`) run one by one. In
        the others the floor of what can't be scored is that of the process's own call.
        Pass it in place of the reward; everything else takes the reward itself.
        """

        async def reward(*args: Any, **kwargs: Any) -> list[float | None]:
            ranks = self.scorer.ranks
            if ranks.have_met and ranks.node is None:
                before = _MAY_WAIT.set(False)
                try:
                    return await asyncio.to_thread(self, *args, **kwargs)
                finally:
                    _MAY_WAIT.reset(before)
            return self(*args, **kwargs)  # waits for other processes, which have to be met in one order everywhere

        reward.__name__ = self.__name__
        setattr(reward, "_cdr_reward", self)  # noqa: B010 - what `_compat.cdr_reward` knows it by
        return reward

    def use_trainer(self, trainer: Any) -> None:
        """
        Set this reward up for a trainer: read all that scores depend on, check it, load the pair, log the reward's
        metrics and record its options. GRPO, RLOO and `OnlinePreferenceTrainer` do this in their first call of the
        reward, and [`CDRCallback`] when training begins. The second time nothing happens. Waits for all processes.

        Args:
            trainer (`Trainer`): One of its reward functions is this reward, or calls it.

        Raises:
            ConfigError, InputError, ModelError: see `trainer_setup.set_up`.
        """
        if self._trainer is not None and self._trainer() is trainer:
            return
        set_up(self, trainer)
        callbacks = trainer.callback_handler.callbacks
        keepers = [one for one in callbacks if isinstance(one, ProvenanceCallback)]
        if not keepers:
            keepers.append(ProvenanceCallback(self))
            trainer.add_callback(keepers[0])
        keepers[0].join(trainer)
        metrics = [one for one in callbacks if isinstance(one, MetricsCallback) and one.reward is self]
        if not metrics:
            metrics.append(MetricsCallback(self, trainer))
            insert_before_integrations(metrics[0], trainer)
        self._metrics = weakref.ref(metrics[0])
        self._trainer, self._has_compared = weakref.ref(trainer), False

    def attach(self, trainer: Any) -> None:
        """
        Put the pair on the base of a trainer's policy, with `share_policy`: strong and weak are that base with adapters
        of their own, or without one. Before the first step; GRPO and RLOO do it by themselves, and so does
        [`CDRCallback`].

        Args:
            trainer (`Trainer`): Its policy trains an adapter (LoRA) on the base that strong and weak name. Neither the
                policy nor any flag of it is changed.

        Raises:
            ConfigError: `share_policy` is not set.
        """
        if not self.config.cdr_share_policy:
            raise ConfigError("share_policy is not set: the pair is loaded beside the policy. Pass share_policy=True.")
        self.scorer.use_policy(_compat.unwrapped_policy(trainer))

    def observe(self, observer: Callable[[Call], None]) -> None:
        """
        Have every later call handed to `observer`. Observers are not pickled, and a method does not keep its object: a
        reward may outlive a trainer whose run ended by an error.
        """
        self.unobserve(observer)
        self._observers.append(weakref.WeakMethod(observer) if inspect.ismethod(observer) else lambda: observer)

    def unobserve(self, observer: Callable[[Call], None]) -> None:
        """Let go of an observer, and of those that are gone."""
        self._observers = [held for held in self._observers if held() not in (None, observer)]

    @property
    def _cdr_reward(self) -> "CDRReward":
        """What `_compat.cdr_reward` knows it by."""
        return self

    def _follow_online_dpo(self, rows: Any) -> None:
        """
        Read prompts as online DPO does: without BOS before string prompts, and with the variables that its data set
        has for each row (GRPO and RLOO do not read them). One call has one set of variables. The trainer is not known.

        Args:
            rows (`list` or `None`): The data set's column `chat_template_kwargs`.
        """
        rows = list(rows) if isinstance(rows, (list, tuple)) else []
        variables = rows[0] if rows else self.scorer.form.template_kwargs
        if all(row == variables for row in rows):
            self.scorer.use_conversations(variables, self.scorer.form.tools, adds_bos=False)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: the data set's column chat_template_kwargs differs between rows of one batch. Online DPO renders "
                "each prompt with its own variables, and the pair reads all prompts with %s.",
                self.__name__,
                self.scorer.form.template_kwargs,
            )

    def _on_unscorable(self, trainer: Any) -> str:
        """`cdr_on_unscorable`, decided for this trainer (None where it is not known)."""
        if self.config.cdr_on_unscorable != "auto":
            return self.config.cdr_on_unscorable
        # A function that calls this one may not expect None.
        return "none" if self._is_asked(trainer) and _compat.skips_missing_rewards(trainer) else "floor"

    def _is_asked(self, trainer: Any) -> bool:
        """Whether a trainer (None: not known) asks this reward itself, and no function in between."""
        return any(_compat.cdr_reward(function) is self for function in _compat.reward_functions(trainer))

    def _compare_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Compare the first batch's prompts with the policy's, if the trainer is known."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None and not self._has_compared:
            self._has_compared = True
            compare_prompts(self.__name__, self.scorer, trainer, prompts)

    def _report(self, call: Call, log_metric: Any, log_extra: Any, *, is_trainers: bool) -> None:
        name = self.config.cdr_name
        metrics = None if self._metrics is None or not is_trainers else self._metrics()
        if metrics is not None:
            metrics.count(call)
        elif log_metric is not None:  # a caller with logs of its own
            for key, value in call_metrics(call).items():
                log_metric(f"{name}/{key}", value)
        if log_extra is not None:
            log_extra(f"{name}_strong_logps", [score.strong_logps for score in call.scores])
            log_extra(f"{name}_weak_logps", [score.weak_logps for score in call.scores])
            log_extra(f"{name}_tokens", [score.n_tokens for score in call.scores])
            log_extra(f"{name}_gated", [score.gated for score in call.scores])
        for held in self._observers:
            if (observer := held()) is not None:
                observer(call)

    def _warn(self, scores: Sequence[Score]) -> None:
        unscorable = [index for index, score in enumerate(scores) if score.error is not None]
        if unscorable:
            logger.warning(
                "%s: %d of %d completions could not be scored. The first, row %d: %s.",
                self.__name__,
                len(unscorable),
                len(scores),
                unscorable[0],
                scores[unscorable[0]].error,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observers": [], "_trainer": None, "_metrics": None}
