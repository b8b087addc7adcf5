"""CDRCallback: services for a reward that a trainer lacks. Touches no model and counts nothing.

It sets the reward up before the first step (GRPO and RLOO do this in the first step, online DPO never does), watches
for reward hacking (`gaming_watch`) and keeps online DPO's completions.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerControl, TrainerState, TrainingArguments

from .. import _compat
from ..errors import ConfigError
from .completions_table import table_rows, write_table
from .gaming_watch import GamingWatch
from .metrics import Call
from .metrics_callback import insert_before_integrations
from .provenance import ProvenanceCallback
from .reward import CDRReward
from .trainer_setup import KnownTrainer, set_up


class CDRCallback(ProvenanceCallback):
    """
    Metrics, provenance and an early start for a [`CDRReward`].

    - Sets the reward up when training begins (see `CDRReward.use_trainer`), so that the first step does not wait for
      the pair. GRPO, RLOO and `OnlinePreferenceTrainer` do this by themselves in their first step; online DPO does not.
    - In online DPO the reward's metrics are logged only with this callback; see `MetricsCallback`.
    - Warns of a policy that games the reward, or stops the run (`cdr_on_gaming`), by the rule of `monitor`, and logs
      `<name>/alarm`: 0, and 1 from the alarm on. Where nothing is logged, nothing is watched.
    - Writes `cdr_labeling.json` into the output folder and every checkpoint: options, weights, a hash of the
      criteria, versions. With `trainer`, model cards say it too.

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
        self._rows: list[dict[str, Any]] = []  # this process's completions since the last log
        self._gathered_at = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        is_online_dpo = _compat.is_online_dpo(args)
        self._check(is_online_dpo)
        if self._trainer is None:  # the first call tells the rest
            set_up(self.reward, KnownTrainer(args, state, kwargs.get("model"), kwargs.get("processing_class")))
            super().on_train_begin(args, state)
        else:
            insert_before_integrations(self, self._trainer)
            self.reward.use_trainer(self._trainer)
            self.join(self._trainer)
            if is_online_dpo and self._log_completions:
                self.reward.observe(self._observe)
        self._watch.start(state.log_history)
        self._rows, self._gathered_at = [], state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # All processes come here. In on_log they may not: by TRL's convention some log on the main process alone.
        if control.should_log:
            self._gather(args, state)

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None:
            self._watch.read(state, control, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self._gather(args, state)  # the last steps' completions; no log of theirs follows
        self._watch.end()
        self.reward.unobserve(self._observe)  # the reward may outlive the trainer, and serve another

    def _check(self, is_online_dpo: bool) -> None:
        if self._trainer is None and is_online_dpo:
            raise ConfigError(
                "trainer is missing, and online DPO logs a reward's metrics only through it. Pass "
                "CDRCallback(reward, trainer)."
            )
        rewards = [_compat.cdr_reward(function) for function in _compat.reward_functions(self._trainer)]
        if self._trainer is not None and not any(reward is self.reward for reward in rewards):
            raise ConfigError(
                f"the trainer does not use {self.reward.__name__}. Pass the same object as reward_funcs= and to "
                "CDRCallback."
            )

    def _observe(self, call: Call) -> None:
        if self._trainer.model.training:
            self._rows += table_rows(call)

    def _gather(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the completions that all processes have gathered."""
        if not self._log_completions or self._trainer is None or state.global_step == self._gathered_at:
            return
        self._gathered_at = state.global_step
        rows, self._rows = gather_object(self._rows), []
        if state.is_world_process_zero:
            write_table(rows, Path(args.output_dir) / "completions", step=state.global_step)
