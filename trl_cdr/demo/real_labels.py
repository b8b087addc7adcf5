"""Does the ratio of the real pair label well? Judged by gold, on pairs that the policy wrote. Trains nothing.

Each function returns plain numbers; `real` runs them and prints.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..annotation.intervals import bootstrap
from ..annotation.rewardbench import credit
from ..conditioning.criteria import Criteria, DomainCriteria
from ..scoring.rewards import rewards_from_scores
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from . import real_world
from .models import Sample
from .real_models import Pair, choose_pairs

_MATCHED = 0.2

SETS = {
    "drawn": "as written",
    "matched": "lengths within 20 %",
    "condition": "well-formed both, only one meets the condition",
}
"""Of pairs."""
JUDGES = {
    "ratio": "CDR: strong over weak",
    "reward": "the same, behind the gate surprise",
    "strong_logps": "strong's log-probability",
    "strong_mean": "strong's, mean per token",
    "weak_logps": "weak's log-probability",
    "shorter": "the shorter one",
    "random": "random",
}


def measure_labels(
    scorer: DensityRatioScorer,
    tasks: Sequence[real_world.Task],
    groups: Sequence[Sequence[Sample]],
    *,
    per_prompt: int = 3,
) -> dict[str, Any]:
    """
    How often each judge prefers the completion that gold calls right.

    Args:
        scorer (`DensityRatioScorer`): Of the pair, with the gate.
        tasks, groups: What was asked, and what the policy wrote to each.
        per_prompt (`int`, *optional*, defaults to 3): At most so many pairs a task.

    Returns:
        `dict`: for each of `SETS` `pairs` and by judge of `JUDGES` `[share, low, high]` (None without pairs), see
        `bootstrap`, and `lead`, by how much the ratio's share is above strong's log-probability's, of the same pairs;
        and `kinds`: by kind of condition the share that gold calls right, and the ratio's share of the
        pairs as drawn.
    """
    chosen = {
        "drawn": choose_pairs(tasks, groups, per_prompt=per_prompt),
        "matched": choose_pairs(tasks, groups, per_prompt=per_prompt, nearest=True),
        "condition": choose_pairs(tasks, groups, per_prompt=per_prompt, only_condition=True),
    }
    scores = iter(score_samples(scorer, [pair for pairs in chosen.values() for pair in pairs]))
    found: dict[str, Any] = {}
    for name, pairs in chosen.items():
        rows = [(pair, next(scores), next(scores)) for pair in pairs]
        if name == "matched":
            rows = [row for row in rows if _one_length(*row[1:])]
        found[name] = _shares([pair for pair, _, _ in rows], _judge([score for row in rows for score in row[1:]]))
        if name == "drawn":
            won = _wins([score.value or 0.0 for row in rows for score in row[1:]])
    kinds = {}
    for kind in dict.fromkeys(task.kind.name for task in tasks):
        golds = [
            real_world.gold(task, one.text, one.finished)
            for task, group in zip(tasks, groups, strict=True)
            if task.kind.name == kind
            for one in group
        ]
        wins = [win for win, pair in zip(won, chosen["drawn"], strict=True) if pair.task.kind.name == kind]
        kinds[kind] = {"gold": sum(golds) / len(golds), "pairs": len(wins), "ratio": sum(wins) / max(1, len(wins))}
    return {**found, "kinds": kinds}


def measure_criteria(
    plain: DensityRatioScorer, topics: Sequence[str], groups: Sequence[Sequence[Sample]], *, per_prompt: int = 3
) -> dict[str, Any]:
    """
    Does a condition that only the pair is shown, as a criterion, order what the policy wrote without it?

    Args:
        plain (`DensityRatioScorer`): Of the pair, without criteria.
        topics, groups: What a sentence was asked about, and what the policy wrote to each.
        per_prompt (`int`, *optional*, defaults to 3): At most so many pairs a topic and condition.

    Returns:
        `dict`: by kind of condition `pairs`, and `[share, low, high]` of the pairs in which the text that meets the
        condition is preferred under `none` (the plain ratio), `own` (the condition as criterion) and `other` (another
        condition's), and for `shorter`. `all` has the pairs of all kinds.
    """
    kinds = (*real_world.SEEN, *real_world.UNSEEN)
    conditions = {kind.name: kind.form.format(kind.values[0]) for kind in kinds}
    names = list(conditions)
    criteria = Criteria({name: DomainCriteria(condition) for name, condition in conditions.items()})
    shown = DensityRatioScorer(share=plain, criteria=criteria)
    found: dict[str, Any] = {}
    every: dict[str, list[float]] = {"none": [], "own": [], "other": [], "shorter": []}
    asked: list[str] = []
    for kind in kinds:
        tasks = [real_world.Task(topic, kind, kind.values[0]) for topic in topics]
        pairs = choose_pairs(tasks, groups, per_prompt=per_prompt)
        if not pairs:
            continue
        other = names[(names.index(kind.name) + 1) % len(names)]
        scores = {
            "none": score_samples(plain, pairs, bare=True),
            "own": score_samples(shown, pairs, bare=True, domain=kind.name),
            "other": score_samples(shown, pairs, bare=True, domain=other),
        }
        wins = {name: _wins([score.value or 0.0 for score in column]) for name, column in scores.items()}
        wins["shorter"] = _wins([-score.n_tokens for score in scores["none"]])
        topics_of = [pair.task.topic for pair in pairs]
        found[kind.name] = {"pairs": len(pairs)} | {name: bootstrap(won, topics_of) for name, won in wins.items()}
        for name, won in wins.items():
            every[name] += won
        asked += topics_of
    found["all"] = {"pairs": len(asked)} | {name: bootstrap(won, asked) for name, won in every.items()}
    return found


def score_samples(
    scorer: DensityRatioScorer, pairs: Sequence[Pair], *, bare: bool = False, domain: str | None = None
) -> list[Score]:
    """Scores of right, wrong, right, wrong, ...; `bare`: as completions to the request without its condition."""
    rows = [(pair.task, one) for pair in pairs for one in (pair.right, pair.wrong)]
    distinct = list({(task.request, one): (task, one) for task, one in rows}.values())
    scores = scorer.score(
        [real_world.ask(task.topic) if bare else task.prompt for task, _ in distinct],
        [one.text for _, one in distinct],
        finished=[one.finished for _, one in distinct],
        domains=None if domain is None else [domain] * len(distinct),
    )
    found = {(task.request, one): score for (task, one), score in zip(distinct, scores, strict=True)}
    return [found[task.request, one] for task, one in rows]


def _judge(scores: Sequence[Score]) -> dict[str, list[Any]]:
    rng = random.Random(0)
    judged: dict[str, Callable[[Score], Any]] = {
        "ratio": lambda score: score.value,
        "reward": lambda score: rewards_from_scores([score], on_unscorable="floor")[0],
        "strong_logps": lambda score: score.strong_logps,
        "strong_mean": lambda score: (score.strong_logps or 0.0) / score.n_tokens,
        "weak_logps": lambda score: score.weak_logps,
        "shorter": lambda score: -score.n_tokens,
        "random": lambda _: rng.random(),
    }
    return {name: [judge(score) for score in scores] for name, judge in judged.items()}


def _one_length(one: Score, other: Score) -> bool:
    return abs(one.n_tokens - other.n_tokens) <= _MATCHED * max(one.n_tokens, other.n_tokens)


def _wins(values: Sequence[float]) -> list[float]:
    """What each pair earns, see `credit`."""
    return [credit([right], [wrong]) for right, wrong in zip(values[::2], values[1::2], strict=True)]


def _shares(pairs: Sequence[Pair], values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    if not pairs:
        return {"pairs": 0, "lead": None} | dict.fromkeys(JUDGES)
    requests = [pair.task.request for pair in pairs]
    wins = {name: _wins(column) for name, column in values.items()}
    lead = [ours - likely for ours, likely in zip(wins["ratio"], wins["strong_logps"], strict=True)]
    shares = {name: bootstrap(won, requests) for name, won in wins.items()}
    return {"pairs": len(pairs), "lead": bootstrap(lead, requests), **shares}
