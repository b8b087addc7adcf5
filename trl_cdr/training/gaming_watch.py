"""What `CDRCallback` does about a policy that games its reward: `monitor` judges every log, this says so, or stops.

What is judged is the trainer's own log, which is the same on every process and part of every checkpoint: all processes
decide alike, and a resumed run like one that was never stopped.
"""

import logging
from typing import Any

from transformers import TrainerControl, TrainerState

from .completions_table import as_text
from .metrics import Call
from .monitor import Alarm, Monitor, read_entry
from .reward import CDRReward

logger = logging.getLogger(__name__)

_SAMPLES = 3
_LONGEST = 200  # characters of a sample, and of its prompt


class GamingWatch:
    """
    Judge a run's log as it grows.

    Args:
        reward (`CDRReward`): What is watched; its `cdr_on_gaming` says what an alarm does.
    """

    def __init__(self, reward: CDRReward) -> None:
        self._reward = reward
        self._monitor = Monitor(reward.config.cdr_name)
        self._call: Call | None = None

    def start(self, history: list[dict[str, Any]]) -> None:
        """
        Begin a run.

        Args:
            history (`list[dict]`): The `log_history` of what it resumes. An alarm in it is not raised again.
        """
        self._monitor, self._call = Monitor(self._reward.config.cdr_name), None
        for entry in history:
            self._monitor.read(entry)
        if self._reward.config.cdr_on_gaming != "off":
            self._reward.observe(self._observe)

    def end(self) -> None:
        """Let go of the reward, and of what it scored."""
        self._call = None
        self._reward.unobserve(self._observe)

    def read(self, state: TrainerState, control: TrainerControl, logs: dict[str, float]) -> None:
        """
        Take in the log that the trainer has just written.

        Adds `<name>/alarm` to one that holds the reward's metrics: 0, and 1 from the alarm on. The alarm itself is said
        on the main process.
        """
        config = self._reward.config
        entry = state.log_history[-1] if state.log_history else {}
        if config.cdr_on_gaming == "off" or read_entry(entry, name=config.cdr_name) is None:
            return
        is_new = self._monitor.read(entry)
        logs[f"{config.cdr_name}/alarm"] = entry[f"{config.cdr_name}/alarm"] = float(self._monitor.alarm is not None)
        if not is_new:
            return
        if config.cdr_on_gaming == "stop":
            control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            assert self._monitor.alarm is not None
            logger.warning("%s", self._describe(self._monitor.alarm))

    def _observe(self, call: Call) -> None:
        self._call = call

    def _describe(self, alarm: Alarm) -> str:
        """One line."""
        gate = "" if self._reward.config.cdr_gate == "surprise" else "pass cdr_gate='surprise', "
        stops = self._reward.config.cdr_on_gaming == "stop"
        return (
            f"{self._reward.__name__}: the policy may be gaming the reward. Step {alarm.step}: {alarm.reason}. Paid "
            f"best: {', '.join(paid_best(self._call)) or 'not known'}. Read them; if they are no good, go back to a "
            f"checkpoint from before, and {gate}hold the policy closer to its start (a larger beta) or lower the "
            f"learning rate.{' Training ends here, with a checkpoint.' if stops else ''}"
        )


def paid_best(call: Call | None) -> list[str]:
    """Up to three different completions of a call, those with the highest rewards first, each with its prompt."""
    if call is None:
        return []
    rows = zip(call.rewards, call.completions, call.prompts, strict=True)
    paid = [(reward, as_text(said), as_text(prompt)) for reward, said, prompt in rows if reward is not None]
    best = {said: (reward, prompt) for reward, said, prompt in sorted(paid, key=lambda row: row[0])}  # the last counts
    ranked = sorted(best.items(), key=lambda item: -item[1][0])[:_SAMPLES]
    return [f"{said[:_LONGEST]!r} ({reward:+.2f} nats, to {prompt[-_LONGEST:]!r})" for said, (reward, prompt) in ranked]
