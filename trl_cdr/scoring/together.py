"""A scorer by all processes of a run at once, as trainers call a reward: each row is scored where a pair is.

`ranks` knows the processes, `scorer` scores. Both functions wait for the other processes, and all have to call them:
TRL's trainers ask their reward functions on every process in every step, and gather what they say right away.
"""

from collections.abc import Sequence
from datetime import date
from itertools import islice
from typing import Any

from ..errors import ConfigError
from .columns import Columns, check_columns, check_ids, join_columns
from .pair import Pair
from .ranks import Weights
from .score import Score
from .scorer import DensityRatioScorer
from .types import Message, Prompt
from .weights import fingerprint


def load_together(scorer: DensityRatioScorer) -> None:
    """
    Load the pair for a trainer: in every process, or in one of each machine (`cdr_replicas`). Check that strong and
    weak differ. The first time the weights of all processes are compared.

    Args:
        scorer (`DensityRatioScorer`): This process's; all have the same options.

    Raises:
        ConfigError, ModelError: as `DensityRatioScorer.load`, where one process raises, on all; weights differ between
            processes; which of them are of one machine can't be told; strong and weak have the same weights.
    """
    if not scorer.ranks.have_met:
        # Processes that start around midnight: the first one's date is everyone's.
        first = scorer.ranks.lowest({"day": scorer.form.today.toordinal()})["day"]
        scorer.use_date(date.fromordinal(int(first)))
        scorer.ranks.meet(lambda: _weights(scorer))
    elif scorer.ranks.holds_pair:
        with scorer.use() as pair:
            _check_differ(pair)


def score_together(
    scorer: DensityRatioScorer,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Sequence[Message]],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    domains: Sequence[str | None] | None = None,
) -> list[Score]:
    """
    `DensityRatioScorer.score` for this process's rows in a trainer, of which there may be none. With one pair a machine
    they are scored with its other processes' rows, in one call.

    Raises:
        InputError, ConfigError, ModelError: as `DensityRatioScorer.score` and `load_together`; with one pair a machine,
            where one of its processes raises, on all.
    """
    if len(prompts) or not scorer.ranks.have_met:
        load_together(scorer)
    if scorer.ranks.node is None:
        return scorer.score(
            prompts,
            completions,
            completion_ids=completion_ids,
            domains=domains,
            is_generated=[True] * len(prompts),
            in_trainer=True,
        )

    def read() -> Columns:
        check_columns(prompts, completions, completion_ids=completion_ids, domains=domains)
        ids = None if completion_ids is None else check_ids(completion_ids)
        return Columns(list(prompts), list(completions), ids, None if domains is None else list(domains))

    scores: list[Score] = scorer.ranks.node.exchange(read, lambda parts: _score_parts(scorer, parts))
    return scores


def _score_parts(scorer: DensityRatioScorer, parts: list[Columns]) -> list[list[Score]]:
    """One call for all rows, so that what they share is run once."""
    rows = join_columns(parts)
    scores = iter(
        scorer.score(
            rows.prompts,
            rows.completions,
            completion_ids=rows.completion_ids,
            domains=rows.domains,
            is_generated=[True] * len(rows.prompts),
            in_trainer=True,
        )
    )
    return [list(islice(scores, len(part.prompts))) for part in parts]


def _weights(scorer: DensityRatioScorer) -> dict[str, Weights]:
    """Which weights this process has, all of them read once; of a model on a server none."""
    found: dict[str, Any] = {}
    with scorer.use() as pair:
        _check_differ(pair)
        for role, member in (("strong", pair.strong), ("weak", pair.weak)):
            if member.is_served:  # and looked at there, by what it gives for a known row
                found[role] = Weights(member.lm.name, None, 0)
                continue
            member.local.wake()
            found[role] = Weights(member.lm.name, member.local.weights, fingerprint(member.local.model))
    return found


def _check_differ(pair: Pair) -> None:
    if pair.has_equal_weights:
        raise ConfigError(
            f"strong ({pair.strong.lm.name}) and weak ({pair.weak.lm.name}) have the same weights: every log-ratio is "
            "0, and the policy would learn from the gate's penalty alone. Pass two models that differ."
        )
