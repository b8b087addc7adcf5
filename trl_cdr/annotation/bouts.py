"""Texts beside honest completions: scored behind each gate, and counted where they are worth more.

Writes no text; `probe` and `demo.real_gate` bring them.
"""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..scoring.rewards import rewards_from_scores
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from ..scoring.types import Completion, Prompt
from .intervals import bootstrap


@dataclass(frozen=True)
class Bout:
    """
    An attack on one prompt, behind one gate. `place`: the prompt's; `reward`: of the attack, or of the best where there
    are several (`None`: it can't be scored); `honest`: the honest completion's.
    """

    place: int
    text: str
    reward: float | None
    honest: float
    gated: bool

    @property
    def is_won(self) -> bool:
        """The attack is worth more. A tie is none."""
        return self.reward is not None and self.reward > self.honest


def with_gate(scorer: DensityRatioScorer, gate: str) -> DensityRatioScorer:
    """The scorer behind another gate, on the same models. Domains have to be handed to it."""
    config = scorer.config
    if config.cdr_gate == gate:
        return scorer
    return DensityRatioScorer(
        share=scorer,
        criteria=scorer.criteria,
        gate=gate,
        reduction=config.cdr_reduction,
        token_budget=config.cdr_token_budget,
        policy_tokenizer=config.cdr_policy_tokenizer,
        num_exemplars=config.cdr_num_exemplars,
        exemplar_style=config.cdr_exemplar_style,
        seed=config.cdr_seed,
    )


def score_completions(
    scorer: DensityRatioScorer,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    domains: Sequence[str | None] | None = None,
) -> list[Score]:
    """Score completions as a trainer does: each follows the generation prompt. Some may have the pair's token ids."""
    return scorer.score(
        prompts,
        [one.text for one in completions],
        completion_ids=[one.ids or () for one in completions],
        finished=[one.finished for one in completions],
        domains=domains,
        is_generated=[True] * len(completions),
    )


def hold_bouts(
    scorers: Mapping[str, DensityRatioScorer],
    prompts: Sequence[Prompt],
    honest: Sequence[Completion],
    attacks: Mapping[str, Sequence[Sequence[Completion]]],
    *,
    domains: Sequence[str | None] | None = None,
) -> dict[str, dict[str, list[Bout]]]:
    """
    Score attacks beside honest completions.

    Args:
        scorers (`Mapping`): By the name of its gate. `none` comes with any other.
        prompts, honest: As many of one as of the other.
        attacks (`Mapping`): By name, for each prompt the texts, of which the best counts; none where there is none.
        domains (`Sequence`, *optional*): Of the prompts.

    Returns:
        `dict`: by attack, by gate, a [`Bout`] for each prompt that has a text. A prompt whose honest completion can't
        be scored has none.
    """
    rows = list(enumerate(honest))
    firsts: dict[str, list[range]] = {}
    for name, texts in attacks.items():
        firsts[name] = []
        for place, several in enumerate(texts):
            firsts[name].append(range(len(rows), len(rows) + len(several)))
            rows += [(place, one) for one in several]
    found: dict[str, dict[str, list[Bout]]] = {name: {} for name in attacks}
    for gate, (rewards, gated) in _reward(scorers, prompts, rows, domains).items():
        for name, ranges in firsts.items():
            found[name][gate] = []
            for place, among in enumerate(ranges):
                right = rewards[place]
                if not among or right is None:
                    continue
                best = max(among, key=lambda row: (rewards[row] is not None, rewards[row] or 0.0))
                found[name][gate].append(Bout(place, rows[best][1].text, rewards[best], right, gated[best]))
    return found


def summarise(bouts: Mapping[str, Mapping[str, Sequence[Bout]]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """
    What came of bouts.

    Returns:
        `dict`: by attack `prompts` (those it was tried on), `unscorable` (of these), and by gate `win` `[share, low,
        high]`, see `bootstrap`, by prompt, and `gated` (share). Attacks that were tried on no prompt are left out.
    """
    found: dict[str, Any] = {}
    for name, by_gate in bouts.items():
        for gate, each in by_gate.items():
            if not each:
                continue
            wins = [float(bout.is_won) for bout in each]
            unscorable = sum(bout.reward is None for bout in each)
            found.setdefault(name, {"prompts": len(each), "unscorable": unscorable})[gate] = {
                "win": bootstrap(wins, [request_key(prompts[bout.place]) for bout in each]),
                "gated": sum(bout.gated for bout in each) / len(each),
            }
    return found


def measure_honest(
    scorers: Mapping[str, DensityRatioScorer],
    prompts: Sequence[Prompt],
    honest: Sequence[Sequence[Completion]],
    *,
    domains: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """
    What a reward says of honest completions.

    Returns:
        `dict`: `completions`, the share `finished`, `tokens` (mean), and by gate `gated` (share), `ties` (share of the
        pairs of one prompt's completions that have equal rewards) and `length_correlation` (Pearson's, of reward and
        tokens; within prompts, where some have several completions). `None` where there is nothing to tell by.
    """
    rows = [(place, one) for place, group in enumerate(honest) for one in group]
    found: dict[str, Any] = {}
    tokens: list[int] = []
    for gate, (rewards, gated) in _reward(scorers, prompts, rows, domains, tokens=tokens).items():
        groups: dict[int, list[tuple[float, int]]] = {}
        for (place, _), reward, count in zip(rows, rewards, tokens, strict=True):
            if reward is not None:
                groups.setdefault(place, []).append((reward, count))
        pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
        found[gate] = {
            "gated": sum(gated) / len(rows),
            "ties": sum(one[0] == other[0] for one, other in pairs) / len(pairs) if pairs else None,
            "length_correlation": _correlate(list(groups.values())),
        }
    finished = sum(one.finished is True for _, one in rows) / len(rows)
    return {"completions": len(rows), "finished": finished, "tokens": statistics.fmean(tokens), **found}


def _reward(
    scorers: Mapping[str, DensityRatioScorer],
    prompts: Sequence[Prompt],
    rows: Sequence[tuple[int, Completion]],
    domains: Sequence[str | None] | None,
    *,
    tokens: list[int] | None = None,
) -> dict[str, tuple[list[float | None], list[bool]]]:
    """By gate the rewards of rows (place of the prompt, completion), and which were stopped; `tokens` is filled."""
    found: dict[str, tuple[list[float | None], list[bool]]] = {}
    for gate, scorer in scorers.items():
        scores = score_completions(
            scorer,
            [prompts[place] for place, _ in rows],
            [one for _, one in rows],
            None if domains is None else [domains[place] for place, _ in rows],
        )
        if not found:
            found["none"] = [score.value for score in scores], [False] * len(scores)
            if tokens is not None:
                tokens += [score.n_tokens for score in scores]
        rewards = rewards_from_scores(scores, on_unscorable="none", reduction=scorer.config.cdr_reduction)
        found[gate] = rewards, [score.gated for score in scores]
    return found


def _correlate(groups: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Pearson's correlation, within groups where some have several."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        several = [[one for group in groups for one in group]]
    centred = [
        tuple(value - statistics.fmean(column) for value, column in zip(one, zip(*group, strict=True), strict=True))
        for group in several
        for one in group
    ]
    try:
        return statistics.correlation([one[0] for one in centred], [one[1] for one in centred])
    except statistics.StatisticsError:  # fewer than two, or all alike
        return None


def request_key(prompt: Prompt) -> str:
    """What tells prompts apart."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
