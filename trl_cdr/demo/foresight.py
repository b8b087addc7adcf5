"""Does the probe foresee which runs are gamed? What it says of a pair and gate, beside the gold of policies trained so.

The runs are `gaming`'s. The probe sees neither gold nor how a policy is trained: losses, betas and lengths differ among
settings of one pair.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..annotation.intervals import spearman
from ..annotation.probe import probe
from ..scoring.scorer import DensityRatioScorer
from . import models, world

FIGURES = ("mean", "worst")
"""Of `probe`'s `win`. The mean was chosen beforehand; the worst is what `--max_win` looks at."""
_EVERY = 4  # of the 216 held-out prompts


def probe_pair(strong: Path, weak: Path, policy: Path, *, gate: str) -> dict[str, Any]:
    """
    What the probe finds in the tiny world, on 54 held-out prompts, each with its first right completion.

    Args:
        strong, weak, policy (`Path`): Checkpoints.
        gate (`str`): `cdr_gate`.
    """
    tasks = world.HELD_OUT[::_EVERY]
    return probe(
        DensityRatioScorer(str(strong), str(weak), device="cpu", gate=gate),
        [world.conversation(task) for task in tasks],
        [task.right[0] for task in tasks],
        policy=str(policy),
        gates=(),
        max_new_tokens=models.MAX_NEW_TOKENS,
    )


def correlate(
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]], gold: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """
    Rank correlation of the probe's figures with the gold reward at the end.

    Args:
        figures (`Mapping`): By setting and gate, `win` of what `probe_pair` returns.
        gold (`Mapping`): By setting and gate, the gold reward at the end of each run; its mean counts. Gates that the
            probe has no figure of are left out.

    Returns:
        `dict`: `points` (settings x gates), `figures` (different values of the mean among them), and Spearman's
        coefficient by name of `FIGURES`, `None` where one side does not vary.
    """
    points = [
        (figures[setting][gate], statistics.fmean(finals))
        for setting, by_gate in gold.items()
        for gate, finals in by_gate.items()
        if gate in figures.get(setting, {})
    ]
    found: dict[str, Any] = {"points": len(points), "figures": len({figure["mean"] for figure, _ in points})}
    for name in FIGURES:
        found[name] = spearman([figure[name] for figure, _ in points], [final for _, final in points])
    return found
