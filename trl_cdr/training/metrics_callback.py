"""A reward's metrics -> its trainer's logs. `metrics` counts a call; this adds calls, steps and processes up.

`reward` adds it to a trainer. It waits for other processes after every step and after every batch of an evaluation.
"""

import time
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics import Call, Sums, add_sums, call_sums, domain_sums, means

if TYPE_CHECKING:
    from .reward import CDRReward


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """
    Adds a reward's metrics (`<name>/...`) to the logs of its trainer: those of `call_metrics`, the mean reward of each
    domain (`rewards/<domain>`) and, in training, `step_share`: the share of the time that went into labelling. Logs of
    an evaluation have them as `eval_<name>/...`, or `eval_<set>_<name>/...` with several sets.

    Sums and counts are kept until a log divides them, over all steps since the last log and all processes. Unknown
    metrics are not in the log. A checkpoint has the sums that no log has shown yet, so that a resumed run logs the
    values of an uninterrupted one.

    Args:
        reward (`CDRReward`): The reward.
        trainer (`Trainer`): The trainer that uses it.
    """

    def __init__(self, reward: "CDRReward", trainer: Any) -> None:
        self.reward = reward
        self._trainer = trainer
        # The sums of this process that were not gathered yet, and the sums of all processes since the last log.
        self._own: dict[str, Sums] = {}
        self._all: dict[str, Sums] = {}
        self._since = 0.0
        self._start(trainer.state)

    def count(self, call: Call) -> None:
        """Count a call of the reward, in training or in an evaluation."""
        mode = "train" if self._trainer.model.training else "eval"
        domains = {f"rewards/{domain}": part for domain, part in domain_sums(call).items()}
        self._own[mode] = add_sums(self._own[mode], call_sums(call), domains)
        self._own["train"] = add_sums(self._own["train"], {"step_share": (call.seconds, 0.0)})

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._start(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:  # noqa: ARG002
        # All processes come here. In on_log they may not: by TRL's convention some log on the main process alone.
        now = time.perf_counter()
        self._own["train"] = add_sums(self._own["train"], {"step_share": (0.0, now - self._since)})
        self._since = now
        self._gather("train")
        self._store(state)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self._gather("eval")

    def on_predict(self, *_: Any, **__: Any) -> None:
        self._all["eval"] = {}  # no log of theirs follows

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or (prefix := find_prefix(logs)) is None:
            return
        mode = "eval" if prefix else "train"
        name = self.reward.config.cdr_name
        values = {f"{prefix}{name}/{key}": value for key, value in means(self._all[mode]).items()}
        self._all[mode] = {}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        self._store(state)

    def _start(self, state: TrainerState) -> None:
        """Begin a run with the sums of the checkpoint that it resumes."""
        stored = state.stateful_callbacks.get(self.reward.__name__, {})
        sums = stored.get("attributes", {}).get("sums", {})
        self._own = {"train": {}, "eval": {}}
        self._all = {"train": {key: (total, count) for key, (total, count) in sums.items()}, "eval": {}}
        self._since = time.perf_counter()

    def _store(self, state: TrainerState) -> None:
        # Not transformers' ExportableState: a trainer can't save one that was added after the run began.
        state.stateful_callbacks[self.reward.__name__] = {"args": {}, "attributes": {"sums": self._all["train"]}}

    def _gather(self, mode: str) -> None:
        self._all[mode] = add_sums(self._all[mode], *gather_object([self._own[mode]]))
        self._own[mode] = {}


def find_prefix(logs: dict[str, float]) -> str | None:
    """
    Return the prefix of the metrics in a trainer's log: `""` in the log of training steps, `"eval_"` or `"eval_<set>_"`
    after an evaluation. `None` for any other log.
    """
    if "loss" in logs and "learning_rate" in logs:
        return ""
    ending = "_runtime"
    found = [key.removesuffix(ending) for key in logs if key.endswith(ending) and key != f"train{ending}"]
    return f"{found[0]}_" if found else None


def insert_before_integrations(callback: TrainerCallback, trainer: Any) -> None:
    """
    Place a callback after the trainer's own callback, which decides when to log, and before reporting integrations:
    these read a log as it is when they are called.
    """
    handler = trainer.callback_handler
    others = [other for other in handler.callbacks if other is not callback]
    flows = [index for index, other in enumerate(others) if isinstance(other, DefaultFlowCallback)]
    place = flows[0] + 1 if flows else 0
    handler.callbacks = [*others[:place], callback, *others[place:]]
