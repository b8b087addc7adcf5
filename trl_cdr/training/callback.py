"""CDRCallback: what a trainer does not do for a reward function. Touches no model's numbers; `metrics` counts.

The reward's metrics in online DPO, whose trainer hands over no `log_metric`; means by domain, which GRPO and RLOO could
not gather by key; the time that labelling takes; the data set checked and the pair loaded before the first step. The
record of what labelled is `provenance`'s, a policy that games the reward is `gaming_watch`'s.
"""

import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments

from .. import _compat
from ..errors import ConfigError
from ..scoring.together import load_together
from .checks import check_domains, check_name, check_pair, check_policy, compare_prompts, trainer_datasets
from .completions_table import table_rows, write_table
from .gaming_watch import GamingWatch
from .metrics import Call, Sums, add_sums, call_sums, domain_sums, means
from .provenance import ProvenanceCallback, resume_date
from .reward import CDRReward


class CDRCallback(ProvenanceCallback):
    """
    Metrics, provenance and an early start for a [`CDRReward`].

    - Loads the pair when training begins, so that the first step does not pay for it, and compares processes' weights;
      tells the reward the policy's tokenizer, and with `share_policy` the policy, on whose base the pair then stands.
    - In online DPO logs the reward's metrics (`<name>/...`, see `call_metrics`), which GRPO and RLOO log by themselves.
    - With `trainer`, in every trainer, logs the mean reward of each domain (`<name>/rewards/<domain>`) and
      `<name>/step_share`, the share of the time since the last log that went into labelling.
    - Warns of a policy that games the reward, or stops the run (`cdr_on_gaming`), by the rule of `monitor`, and logs
      `<name>/alarm`: 0, and 1 from the alarm on. Where nothing is logged, nothing is watched.
    - Writes `cdr_labeling.json` into the output folder and every checkpoint: options, weights, a hash of the
      criteria, versions. With `trainer`, model cards say it too.

    What is logged reaches `state.log_history` and every reporting integration: means over what was counted since the
    last log, over all processes. It is in the logs of training steps alone.

    Args:
        reward (`CDRReward`): One of the trainer's reward functions.
        trainer (`Trainer`, *optional*): The trainer that this is added to; required in online DPO.
        log_completions (`bool`, *optional*, defaults to `False`): In online DPO, print a sample of each log's
            completions and keep those of all processes under `completions` in the output folder; GRPO and RLOO have an
            option of their own for that.

    Raises:
        ConfigError: `reward` is no `CDRReward`. When training begins: the trainer does not use this reward, or uses two
            of one name; online DPO without `trainer`; the policy is the very module that scores.
        ModelError: When training begins: the pair can't be loaded, or has other weights in another process.
        InputError: When training begins: a data set lacks the router's column, or names an unknown domain in it.

    Example:

    ```python
    trainer = OnlineDPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    trainer.add_callback(CDRCallback(reward, trainer))
    ```
    """

    def __init__(self, reward: CDRReward, trainer: Any = None, *, log_completions: bool = False) -> None:
        if not isinstance(reward, CDRReward):
            raise ConfigError(f"reward is a {type(reward).__name__}. Pass the CDRReward that the trainer uses.")
        super().__init__(reward)
        self._trainer = trainer
        self._log_completions = log_completions
        self._watch = GamingWatch(reward)
        self._is_online_dpo = self._has_compared = False
        # What this process has gathered since the last log, and, over all processes, what the next log gets.
        self._sums: Sums = {}
        self._rows: list[dict[str, Any]] = []
        self._since = time.perf_counter()
        self._gathered_at = 0
        self._ready: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._is_online_dpo = _compat.is_online_dpo(args)
        self._check(kwargs.get("model"))
        if kwargs.get("processing_class") is not None:
            ends = _compat.generation_ends(self._trainer)
            self.reward.scorer.use_policy_tokenizer(kwargs["processing_class"], end_ids=ends)
        variables, tools = _compat.conversation_arguments(self._trainer)
        self.reward.scorer.use_conversations(variables or getattr(args, "chat_template_kwargs", None), tools)
        resume_date(self.reward, args, state)
        if self._trainer is not None and self.reward.config.cdr_share_policy:
            self.reward.attach(self._trainer)
        elif kwargs.get("model") is not None:
            self.reward.scorer.use_policy(kwargs["model"])
        load_together(self.reward.scorer)
        check_pair(self.reward.__name__, self.reward.scorer)
        if self._trainer is None:
            super().on_train_begin(args, state)
        else:
            self.join(self._trainer)
            self._take_place()
            self.reward.observe(self._observe)
        self._watch.start(state.log_history)
        self._sums, self._rows, self._ready = {}, [], {}  # of a run that was stopped
        self._since, self._gathered_at = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The one place before a log that every process passes: in on_log, where some log on the main process alone, as
        # is TRL's convention, it would wait for the others for ever.
        if control.should_log:
            self._gather(args, state)

    on_epoch_end = on_step_end

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and self._ready:
            logs.update(self._ready)
            if state.log_history:
                state.log_history[-1].update(self._ready)
            self._ready = {}
        if logs is not None:
            self._watch.read(state, control, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self._gather(args, state)  # the last steps' completions; no log of theirs follows
        self._ready = {}
        self._watch.end()
        self.reward.unobserve(self._observe)  # the reward may outlive the trainer, and serve another

    def _check(self, policy: Any) -> None:
        name = self.reward.__name__
        if self._trainer is None and self._is_online_dpo:
            raise ConfigError(
                "trainer is missing, and online DPO logs a reward's metrics only through it. Pass "
                "CDRCallback(reward, trainer)."
            )
        rewards = [_compat.cdr_reward(function) for function in _compat.reward_functions(self._trainer)]
        if self._trainer is not None and not any(reward is self.reward for reward in rewards):
            raise ConfigError(
                f"the trainer does not use {name}. Pass the same object as reward_funcs= and to CDRCallback."
            )
        check_name(name, self._trainer)
        check_domains(self.reward.scorer.router, trainer_datasets(self._trainer))
        check_policy(name, policy, self.reward.scorer.modules())

    def _take_place(self) -> None:
        """
        Behind the trainer's own callback, which decides when to log, and before reporting integrations: only who stands
        before them can add to a log.
        """
        handler = self._trainer.callback_handler
        others = [callback for callback in handler.callbacks if callback is not self]
        flows = [index for index, callback in enumerate(others) if isinstance(callback, DefaultFlowCallback)]
        place = flows[0] + 1 if flows else 0
        handler.callbacks = [*others[:place], self, *others[place:]]

    def _observe(self, call: Call) -> None:
        if self._is_online_dpo and not self._has_compared:  # in other trainers the reward does it
            self._has_compared = True
            compare_prompts(self.reward.__name__, self.reward.scorer, self._trainer, call.prompts)
        self._sums = add_sums(self._sums, {"step_share": (call.seconds, 0.0)})
        if not self._trainer.model.training:
            return  # an evaluation's
        self._sums = add_sums(self._sums, {f"rewards/{domain}": part for domain, part in domain_sums(call).items()})
        if self._is_online_dpo:
            self._sums = add_sums(self._sums, call_sums(call))
            if self._log_completions:
                self._rows += table_rows(call)

    def _gather(self, args: TrainingArguments, state: TrainerState) -> None:
        """Make the next log's values ready, and write the completions, from what all processes gathered."""
        if self._trainer is None or state.global_step == self._gathered_at:
            return
        now = time.perf_counter()
        sums = add_sums(self._sums, {"step_share": (0.0, now - self._since)})
        rows, self._rows, self._sums = self._rows, [], {}
        self._since, self._gathered_at = now, state.global_step
        values = means(add_sums(*gather_object([sums])))
        self._ready = {f"{self.reward.config.cdr_name}/{key}": value for key, value in values.items()}
        if self._log_completions:
            everyones = gather_object(rows)
            if state.is_world_process_zero:
                write_table(everyones, Path(args.output_dir) / "completions", step=state.global_step)
