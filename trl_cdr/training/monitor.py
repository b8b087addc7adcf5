"""Does a policy game its reward? What a run has logged -> an alarm. Pure: numbers in, numbers out; knows no trainer.

A log-ratio can rise in two ways. Either the strong model comes to like the policy's text better than it did, or it
likes it less, and the weak model less still: text that neither knows, where the ratio has no bound and means nothing.
So of every log two numbers are read, both in nats a token,

    cost = -log p_strong                   what the policy's text costs the strong model
    gain = log p_strong - log p_weak       what the pair pays for it

Both are means over all tokens that were scored since the last log. One number is watched: waste = cost - gain.
A policy that learns from the pair lowers it: text becomes likelier (the cost falls), or good text is rarer than bad
(the cost rises, and the gain rises as much). It rises if the policy gives up a nat of the strong model's likelihood for
less than a nat of the ratio.

The alarm is a CUSUM. With w_0 the mean waste of the first n logs, and s the noise of one (from the differences between
logs, and a fifth of a nat at least: a smaller change is none),

    S = max(0, S + min((w - w_0) / s, 5) - 1 - 1 / sqrt(n))        alarm: S > 10

so that a rise has to last: one log adds less than 4, however wild it is, and what stays within the noise of a log, and
within that of w_0, adds nothing in the long run.

Nothing of it depends on the size of model, vocabulary or batch, on lengths, on the gate or on other rewards. Lengths,
entropy, ties, the share of distinct tokens and the distance from the start change in healthy runs as they do in others,
and are not looked at. How often the rule is wrong: `examples/RESULTS.md`, by `demo.alarms`.

Neighbours: `metrics` and `metrics_callback` make the numbers, `gaming_watch` acts while a run goes on, `audit` reads
finished runs.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_STEPS = 10
_LOGS = 3
"""What the first and the last steps are: so many steps, and so many logs at least."""
_LEAST_NOISE = 0.2
"""Nats a token."""
_SLACK = 1.0
_MOST = 5.0
_BOUND = 10.0
"""Of the CUSUM, in units of the noise: what a log may have for nothing, what it counts for at most, and the alarm."""
_DIFFERENCES = 100
"""From how many differences between logs, the latest ones, the noise is taken."""
_NORMAL = 1.4826 / math.sqrt(2)
"""The standard deviation of normal numbers, over the median size of the difference between two of them."""


@dataclass(frozen=True)
class Reading:
    """
    What a log says of the policy's text, or several on average.

    Attributes:
        step (`int`): The trainer's; of several the last one.
        cost (`float`): -log p_strong, nats a token.
        gain (`float`): log p_strong - log p_weak, nats a token.
    """

    step: int
    cost: float
    gain: float

    @property
    def waste(self) -> float:
        """What is given up of the strong model's likelihood, less what is had for it, nats a token."""
        return self.cost - self.gain


@dataclass(frozen=True)
class Alarm:
    """
    The policy gives up what the strong model knows, and gets little of the ratio for it.

    Attributes:
        step (`int`): Of the log that says so.
        first, last (`Reading`): Means over the first steps, and over the last ones up to the alarm.
    """

    step: int
    first: Reading
    last: Reading

    @property
    def reason(self) -> str:
        """What was seen, in words and figures."""
        return (
            f"a token of the policy's text costs the strong model {self.last.cost:.2f} nats "
            f"({self.first.cost:.2f} in the first steps), and the log-ratio has changed by "
            f"{self.last.gain - self.first.gain:+.2f} nats a token"
        )


class Monitor:
    """
    The rule, log by log. What it says depends on the logs alone: a resumed run that hands in those of before goes on
    like one that was never stopped.

    Args:
        name (`str`): `cdr_name` of the reward whose metrics are read.

    Attributes:
        alarm (`Alarm` or `None`): There is one at most.
        first, last (`Reading` or `None`): Means over the first steps, and over the last ones so far.
        is_judged (`bool`): There are logs enough beyond the first steps for an alarm.
        n_readings (`int`): Logs that held the metrics, as finite numbers.
    """

    def __init__(self, name: str) -> None:
        self.alarm: Alarm | None = None
        self.first: Reading | None = None
        self.n_readings = 0
        self._name = name
        self._start: list[Reading] = []
        self._recent: deque[Reading] = deque()
        self._differences: deque[float] = deque(maxlen=_DIFFERENCES)
        self._sum = 0.0

    def read(self, entry: Mapping[str, Any]) -> bool:
        """
        Take in an entry of a trainer's `log_history`.

        Args:
            entry (`Mapping`): One that lacks the reward's metrics, or has no finite numbers there, changes nothing.

        Returns:
            `bool`: Whether the alarm is this entry's.
        """
        reading = read_entry(entry, name=self._name)
        if reading is None:
            return False
        self.n_readings += 1
        if self._recent:
            self._differences.append(abs(reading.waste - self._recent[-1].waste))
        self._recent.append(reading)
        while len(self._recent) > _LOGS and self._recent[0].step <= reading.step - _STEPS:
            self._recent.popleft()
        if len(self._start) < _LOGS or reading.step <= _STEPS:
            self._start.append(reading)
            self.first = _mean(self._start)
            return False
        assert self.first is not None
        noise = max(_LEAST_NOISE, _NORMAL * statistics.median(self._differences))
        excess = min((reading.waste - self.first.waste) / noise, _MOST)
        self._sum = max(0.0, self._sum + excess - self._slack)
        if self._sum <= _BOUND or self.alarm is not None:
            return False
        self.alarm = Alarm(reading.step, self.first, _mean(self._recent))
        return True

    @property
    def last(self) -> Reading | None:
        return _mean(self._recent) if self._recent else None

    @property
    def is_judged(self) -> bool:
        return self.n_readings - len(self._start) > _BOUND / (_MOST - self._slack)

    @property
    def _slack(self) -> float:
        return _SLACK + 1 / math.sqrt(max(1, len(self._start)))


def read_entry(entry: Mapping[str, Any], *, name: str) -> Reading | None:
    """
    What an entry of a `log_history` says; None where the reward's metrics are not in it, or are no finite numbers.

    Args:
        entry (`Mapping`): The entry.
        name (`str`): `cdr_name` of the reward.
    """
    metrics = ("strong_logps", "weak_logps", "tokens")  # means over the same completions
    keys = ("step", *(f"{name}/{key}" for key in metrics))
    found = [entry.get(key) for key in keys]
    numbers = [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]
    if len(numbers) < len(keys) or numbers[-1] <= 0:  # nothing was scored
        return None
    step, strong, weak, tokens = numbers
    return Reading(int(step), cost=-strong / tokens, gain=(strong - weak) / tokens)


def names_in(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """`cdr_name` of every reward whose metrics are in a `log_history`; those of an evaluation are not looked at."""
    ending = "/strong_logps_per_token"
    found = dict.fromkeys(key.removesuffix(ending) for entry in history for key in entry if key.endswith(ending))
    return [name for name in found if not (name.startswith("eval_") and name.removeprefix("eval_") in found)]


def _mean(readings: Iterable[Reading]) -> Reading:
    readings = list(readings)
    cost, gain = (statistics.fmean(getattr(one, key) for one in readings) for key in ("cost", "gain"))
    return Reading(readings[-1].step, cost, gain)
