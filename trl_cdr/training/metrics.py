"""A call's scores and rewards -> what a run logs of them. Pure: records in, numbers out.

`reward` hands the call's metrics to GRPO and RLOO, `callback` to online DPO and to the completions table.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..scoring.encoding import Message, Prompt
from ..scoring.score import Score


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
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str | Sequence[Message]]
    tokens: list[Sequence[Hashable]]
    scores: list[Score]
    rewards: list[float | None]
    seconds: float


def call_metrics(call: Call) -> dict[str, float]:
    """
    Means and shares over a call. The same keys whatever it holds, so that every rank logs alike; 0 where nothing is
    known.

    Returns:
        `dict`: `strong_logps`, `weak_logps` (means, nats a completion), `strong_logps_per_token`, `log_ratio_std`
        (nats), `tokens` (mean), `typicality` (mean), the shares `truncated`, `unscorable`, `gated`, `ties` (of the
        completions of one prompt, pairs with equal rewards) and `distinct_tokens` (of each completion's tokens), the
        `length_correlation` of reward and tokens, and `seconds`.
    """
    scored = [score for score in call.scores if score.value is not None]
    lengths = [float(score.n_tokens) for score in scored]
    rewards = [reward for reward, score in zip(call.rewards, call.scores, strict=True) if score.value is not None]
    said = [tokens[: score.n_tokens] for tokens, score in zip(call.tokens, call.scores, strict=True)]  # no padding
    typicalities = [score.typicality for score in scored if score.typicality is not None]
    return {
        "strong_logps": _mean([score.strong_logps for score in scored]),
        "weak_logps": _mean([score.weak_logps for score in scored]),
        "strong_logps_per_token": _mean([(score.strong_logps or 0.0) / score.n_tokens for score in scored]),
        "log_ratio_std": statistics.pstdev([score.value or 0.0 for score in scored]) if scored else 0.0,
        "tokens": _mean(lengths),
        "typicality": _mean([value for value in typicalities if math.isfinite(value)]),
        "truncated": _mean([score.truncated for score in call.scores]),
        "unscorable": _mean([score.error is not None for score in call.scores]),
        "gated": _mean([score.gated for score in call.scores]),
        "ties": _tie_share(call.prompts, call.rewards),
        "distinct_tokens": _mean([len(set(tokens)) / len(tokens) for tokens in said if len(tokens)]),
        "length_correlation": _correlation([reward or 0.0 for reward in rewards], lengths),
        "seconds": call.seconds,
    }


def domain_sums(call: Call) -> dict[str, tuple[float, int]]:
    """For each domain of a call the sum of its rewards and their number; rows without either are left out."""
    sums: dict[str, tuple[float, int]] = {}
    for score, reward in zip(call.scores, call.rewards, strict=True):
        if score.domain is not None and score.value is not None and reward is not None:
            total, count = sums.get(score.domain, (0.0, 0))
            sums[score.domain] = (total + reward, count + 1)
    return sums


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values) if values else 0.0


def _tie_share(prompts: Sequence[Prompt], rewards: Sequence[float | None]) -> float:
    """Of all pairs of completions to one prompt that have rewards, the share whose rewards are equal."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, reward in zip(prompts, rewards, strict=True):
        if reward is not None:
            groups[repr(prompt)].append(reward)
    pairs = ties = 0
    for values in groups.values():
        for index, value in enumerate(values):
            pairs += index
            ties += sum(other == value for other in values[:index])
    return ties / pairs if pairs else 0.0


def _correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's, or 0 where one side does not vary."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0
    return statistics.correlation(left, right)
