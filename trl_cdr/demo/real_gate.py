"""What the gate says of texts on the real pair: of honest ones, and of texts that no policy should be paid for.

Trains nothing; `real` runs it and prints.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..annotation.attacks import ATTACKS, write_attacks
from ..annotation.bouts import hold_bouts, summarise
from ..annotation.intervals import bootstrap
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from ..scoring.types import Completion
from . import real_world


def measure_gates(
    scorers: Mapping[str, DensityRatioScorer], honest: Mapping[str, Sequence[tuple[real_world.Task, str, bool]]]
) -> dict[str, Any]:
    """
    The share of honest texts that each gate stops.

    Args:
        scorers (`Mapping`): By the name of its gate.
        honest (`Mapping`): By kind of text: task, text, and whether it ended by itself.

    Returns:
        `dict`: by kind, by gate `[share, low, high]`, see `bootstrap`.
    """
    found: dict[str, Any] = {}
    for kind, rows in honest.items():
        found[kind] = {"texts": len(rows)}
        for gate, scorer in scorers.items():
            gated = [float(score.gated) for score in _score(scorer, rows)]
            found[kind][gate] = bootstrap(gated, [task.request for task, _, _ in rows])
    return found


def measure_attacks(
    scorers: Mapping[str, DensityRatioScorer], right: Sequence[tuple[real_world.Task, str]]
) -> dict[str, Any]:
    """
    How often a text that is no honest answer is worth more than a right completion to the same task.

    Args:
        scorers (`Mapping`): By the name of its gate.
        right (`Sequence`): Tasks, each with a right completion.

    Returns:
        `dict`: by name of `annotation.attacks.ATTACKS`, see `summarise`.
    """
    prompts = [task.prompt for task, _ in right]
    honest = [Completion(text, True) for _, text in right]
    texts = [
        write_attacks(prompt, one, right[(place + 1) % len(right)][1], random.Random(place))
        for place, (prompt, one) in enumerate(zip(prompts, honest, strict=True))
    ]
    attacks = {name: [[each[name]] if name in each else [] for each in texts] for name in ATTACKS}
    return summarise(hold_bouts(scorers, prompts, honest, attacks), prompts)


def _score(scorer: DensityRatioScorer, rows: Sequence[tuple[real_world.Task, str, bool]]) -> list[Score]:
    return scorer.score(
        [task.prompt for task, _, _ in rows],
        [text for _, text, _ in rows],
        finished=[finished for _, _, finished in rows],
    )
