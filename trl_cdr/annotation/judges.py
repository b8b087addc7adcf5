"""Two models' tables -> what each judge says of every completion: the pair's ratio, and what it should be better than.

Pure; `passes` has run the models, `evaluate` counts who prefers the better completion.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import CDRConfig
from ..scoring.rewards import rewards_from_scores
from ..scoring.score import Score
from .accuracy import Values
from .passes import Entry

JUDGES = {
    "sum": "log-ratio",
    "mean": "log-ratio per token",
    "reward": "reward: behind the gate",
    "strong_sum": "strong's log-probability",
    "strong_mean": "strong's, per token",
    "weak_sum": "weak's log-probability",
    "gate": "the gate alone",
    "longer": "the longer one",
}
"""By name, in words."""
NO_LENGTH = ("gate", "longer")
"""Judges from which nothing is taken for length."""


def judge(strong: Sequence[Entry], weak: Sequence[Entry], texts: Sequence[str], config: CDRConfig) -> dict[str, Values]:
    """
    The values of each judge of `JUDGES`; those of the gate only where there is one.

    Args:
        strong, weak (`Sequence[Entry]`): What the models gave for T completions, none of them an error.
        texts (`Sequence[str]`): The completions, whose characters are counted.
        config (`CDRConfig`): Its reduction is the reward's.

    Returns:
        `dict`: by judge an array of shape (T,), nats where it is not characters.
    """
    sums = [np.array([entry.logps for entry in entries], dtype=float) for entries in (strong, weak)]  # (T,) each
    counts = [np.array([entry.n_tokens for entry in entries], dtype=float) for entries in (strong, weak)]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    found = {"sum": sums[0] - sums[1], "mean": means[0] - means[1]}
    if config.cdr_gate != "none":
        found["reward"] = _behind_gate(found[config.cdr_reduction], strong, config)
    found |= {"strong_sum": sums[0], "strong_mean": means[0], "weak_sum": sums[1]}
    if config.cdr_gate != "none":
        found["gate"] = _behind_gate(np.zeros(len(strong)), strong, config)
    return found | {"longer": np.array([len(text) for text in texts], dtype=float)}


def _behind_gate(ratios: Values, strong: Sequence[Entry], config: CDRConfig) -> Values:
    """The rewards of completions with these ratios."""
    scores = [
        Score(
            float(ratio),
            n_tokens=entry.n_tokens,
            finished=True,
            surprise=entry.surprise,
            survival=entry.survival,
            gated=entry.gated,
        )
        for ratio, entry in zip(ratios, strong, strict=True)
    ]
    rewards: list[Any] = rewards_from_scores(scores, on_unscorable="raise", reduction=config.cdr_reduction)
    return np.array(rewards, dtype=float)
