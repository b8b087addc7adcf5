"""A call's scores and rewards -> the metrics of a run, as sums and counts. Pure: records in, numbers out.

`metrics_callback` adds the sums up and logs them.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..scoring.score import Score
from ..scoring.types import Message, Prompt


@dataclass(frozen=True)
class Call:
    """
    One call of a reward function.

    Attributes:
        prompts, completions: As the trainer handed them over.
        tokens (`list[Sequence[Hashable]]`): Each completion's token ids, padded or not, or its words without them.
        scores (`list[Score]`): One for each completion.
        rewards (`list[float | None]`): What the trainer got.
        seconds (`float`): Wall time of the call.
        wake_seconds (`float`, *optional*): Of these, for waking the pair and putting it to sleep; `None` where it is
            always awake.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str | Sequence[Message]]
    tokens: list[Sequence[Hashable]]
    scores: list[Score]
    rewards: list[float | None]
    seconds: float
    wake_seconds: float | None = None


Sums = dict[str, tuple[float, float]]
"""For each metric a total and what it counts, so that calls and processes of different sizes can be added up."""


def call_metrics(call: Call) -> dict[str, float]:
    """
    Return the means and shares of a call. Unknown metrics are left out.

    Returns:
        `dict`: `strong_logps`, `weak_logps` (means, nats per completion), `strong_logps_per_token` (of all tokens),
        `log_ratio_std` (nats), `tokens` (mean), of the gate `surprise` and `survival` (means, nats) or `typicality`
        (mean), the shares `truncated`, `unscorable`, `gated`, `ties` (of the completions of one prompt, pairs with
        equal rewards) and `distinct_tokens` (of each completion's tokens), the `length_correlation` of reward and
        tokens, and `seconds`, with `cdr_offload` also `wake_seconds`.
    """
    return means(call_sums(call))


def call_sums(call: Call) -> Sums:
    """
    Return the metrics of `call_metrics`, each as a sum and a count: of scored completions, of all completions, of
    tokens, of pairs of one prompt or of calls. A spread or a correlation can't be added up. It counts once for each of
    its completions.
    """
    scored = [score for score in call.scores if score.value is not None]
    lengths = [float(score.n_tokens) for score in scored]
    rewards = [reward for reward, score in zip(call.rewards, call.scores, strict=True) if score.value is not None]
    said = [tokens[: score.n_tokens] for tokens, score in zip(call.tokens, call.scores, strict=True)]  # no padding
    typicalities = [score.typicality for score in scored if score.typicality is not None]
    spread = statistics.pstdev([score.value or 0.0 for score in scored]) if scored else 0.0
    return {
        "strong_logps": _sum([score.strong_logps for score in scored]),
        "weak_logps": _sum([score.weak_logps for score in scored]),
        "strong_logps_per_token": (sum(score.strong_logps or 0.0 for score in scored), sum(lengths)),
        "log_ratio_std": (spread * len(scored), len(scored)),
        "tokens": _sum(lengths),
        "surprise": _sum([score.surprise for score in scored if score.surprise is not None]),
        "survival": _sum([score.survival for score in scored if score.survival is not None]),
        "typicality": _sum([value for value in typicalities if math.isfinite(value)]),
        "truncated": _sum([score.truncated for score in call.scores]),
        "unscorable": _sum([score.error is not None for score in call.scores]),
        "gated": _sum([score.gated for score in call.scores]),
        "ties": _ties(call.prompts, call.rewards),
        "distinct_tokens": _sum([len(set(tokens)) / len(tokens) for tokens in said if len(tokens)]),
        "length_correlation": _correlation([reward or 0.0 for reward in rewards], lengths),
        "seconds": (call.seconds, 1),
        **({} if call.wake_seconds is None else {"wake_seconds": (call.wake_seconds, 1)}),
    }


def domain_sums(call: Call) -> Sums:
    """For each domain of a call the sum of its rewards and their number; rows without either are left out."""
    sums: Sums = {}
    for score, reward in zip(call.scores, call.rewards, strict=True):
        if score.domain is not None and score.value is not None and reward is not None:
            sums = add_sums(sums, {score.domain: (reward, 1)})
    return sums


def add_sums(*parts: Sums) -> Sums:
    """The sums of all parts together; a key need not be in each."""
    added: Sums = {}
    for part in parts:
        for key, (total, count) in part.items():
            before = added.get(key, (0.0, 0))
            added[key] = (before[0] + total, before[1] + count)
    return added


def means(sums: Sums) -> dict[str, float]:
    """Return each metric's mean. A metric with the count 0 is left out: not known is not 0."""
    return {key: total / count for key, (total, count) in sums.items() if count}


def _sum(values: Sequence[Any]) -> tuple[float, float]:
    return float(sum(values)), len(values)


def _ties(prompts: Sequence[Prompt], rewards: Sequence[float | None]) -> tuple[float, float]:
    """Pairs of completions to one prompt whose rewards are equal, and those that have rewards."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, reward in zip(prompts, rewards, strict=True):
        if reward is not None:
            groups[repr(prompt)].append(reward)
    pairs = ties = 0
    for values in groups.values():
        for index, value in enumerate(values):
            pairs += index
            ties += sum(other == value for other in values[:index])
    return ties, pairs


def _correlation(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Pearson's; nothing is known where one side does not vary."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0, 0
    return statistics.correlation(left, right) * len(left), len(left)
