"""How often is the monitor wrong? Runs of the tiny world, recorded, judged by gold and by the monitor's rule.

`run_alarms` is `trl-cdr bench --workload alarms`. The settings are those of `gaming`. Gold, on held-out prompts at
thirteen points of a run, says whether the run was healthy or collapsed; the rule of `training.monitor` never sees it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..training.metrics import Sums, add_sums, call_sums, means
from ..training.monitor import Monitor
from . import gaming, models
from .parts import SETTINGS, Parts
from .story import versions

SEEDS = (5, 6, 7)
"""Not those that the rule was made on (3, 4, 13 and 14)."""
RUNS = {
    "dpo": ("none", "typicality", "surprise"),
    "dpo_long": ("none", "surprise"),
    "sft": ("none", "surprise"),
    "mistakes": ("none", "surprise"),
    "mistakes_long": ("none", "surprise"),
    "simpo": ("none", "surprise"),
    "simpo_mistakes": ("none", "surprise"),
    "pairs_of_two": ("none", "surprise"),
    "pairs_of_eight": ("surprise",),
    "grpo": ("none", "surprise"),
    "grpo_mistakes": ("none", "surprise"),
}
_EVALUATIONS = 12
_HEALTHY = 0.1  # gold that a healthy run may be below its best
_INTERVALS = (1, 10)  # steps between two logs


@dataclass(frozen=True)
class Outcome:
    """
    What became of a run, and what the monitor said.

    Attributes:
        name (`str`): Setting, gate and seed.
        start, best, end (`float`): Gold reward.
        lost_at (`int` or `None`): The first measured step, from the best on, at which half of the gain is lost.
        alarms (`dict[int, int | None]`): By steps between two logs the step of the alarm.
    """

    name: str
    start: float
    best: float
    end: float
    lost_at: int | None
    alarms: dict[int, int | None]

    @property
    def kind(self) -> str:
        """
        `"healthy"`: ends above the start and no more than 0.1 below its best. `"collapsing"`: ends with half of the
        gain lost, or below the start. `"between"`: neither, or, where there was little to lose, both.
        """
        is_healthy = self.end >= self.best - _HEALTHY and self.end > self.start
        is_collapsing = self.end <= self.best - (self.best - self.start) / 2 or self.end < self.start
        return "between" if is_healthy == is_collapsing else "healthy" if is_healthy else "collapsing"


def record(name: str, *, gate: str, seed: int) -> dict[str, Any]:
    """
    Train one setting of `gaming`, and keep the reward's metrics of each call.

    Returns:
        `dict`: `setting`, `gate`, `seed`, `gold` (the curve of `train_with`) and `calls`, see `call_sums`.
    """
    calls: list[Sums] = []
    curve = gaming.train(
        gaming.make_settings()[name],
        gate=gate,
        seed=seed,
        evaluations=_EVALUATIONS,
        observe=lambda call: calls.append(call_sums(call)),
    )
    return {"setting": name, "gate": gate, "seed": seed, "gold": curve, "calls": calls}


def judge(run: dict[str, Any]) -> Outcome:
    """What a recorded run came to; see `record`."""
    steps, gold = run["gold"]["steps"], run["gold"]["gold"]
    best = max(gold)
    half = best - (best - gold[0]) / 2
    lost = [step for step, value in zip(steps, gold, strict=True) if value <= half and step > steps[gold.index(best)]]
    return Outcome(
        f"{run['setting']}, {run['gate']}, {run['seed']}",
        start=gold[0],
        best=best,
        end=gold[-1],
        lost_at=lost[0] if lost else None,
        alarms={every: find_alarm(run["calls"], every=every) for every in _INTERVALS},
    )


def find_alarm(calls: Sequence[Sums], *, every: int) -> int | None:
    """
    The step of the monitor's alarm, were a run of one call a step logged `every` so many steps.

    Args:
        calls (`Sequence[dict]`): See `call_sums`.
        every (`int`): The trainer's `logging_steps`.
    """
    monitor = Monitor("cdr")
    for step in range(every, len(calls) + 1, every):
        logged = means(add_sums(*calls[step - every : step]))
        monitor.read({"step": step, **{f"cdr/{key}": value for key, value in logged.items()}})
    return None if monitor.alarm is None else monitor.alarm.step


def run_alarms(folder: str | Path, *, seeds: Sequence[int] = SEEDS) -> list[Outcome]:
    """
    Record the runs that a folder lacks, a JSON file each, and judge all that it holds.

    Args:
        folder (`str` or `Path`): Made where it is missing; a workload that was stopped goes on where it was.
        seeds (`Sequence[int]`): Of the runs to record.

    Raises:
        ConfigError: the folder holds other results, or runs of other versions; or it can't be written.
    """
    settings = {"workload": "alarms", "calls": "sums", "recipe": models.RECIPE_VERSION, "versions": versions()}
    parts = Parts(Path(folder), settings)
    with models.one_thread(), models.quiet():
        for seed in seeds:
            for name, gates in RUNS.items():
                for gate in gates:
                    parts.run(f"{name}-{gate}-{seed}", partial(record, name, gate=gate, seed=seed))
    return judge_all(path for path in parts.folder.glob("*.json") if path.name != SETTINGS)


def judge_all(paths: Iterable[Path]) -> list[Outcome]:
    """The outcomes of recorded runs, by name."""
    return sorted((judge(json.loads(path.read_text())) for path in paths), key=lambda outcome: outcome.name)


def print_alarms(outcomes: Sequence[Outcome]) -> None:
    """Two Markdown tables on stdout: rates by kind of run and by steps between two logs; and every run."""
    print(f"| runs | alarms, a log every step | every {_INTERVALS[1]} steps | steps before half of the gain was lost |")
    print("|---|---|---|---|")
    for kind in ("healthy", "between", "collapsing"):
        group = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = [sum(outcome.alarms[every] is not None for outcome in group) for every in _INTERVALS]
        leads = [lead for outcome in group if kind == "collapsing" and (lead := _lead(outcome)) is not None]
        print(f"| {len(group)} {kind} | {' | '.join(map(str, counts))} | {' '.join(f'{lead:+d}' for lead in leads)} |")
    print("\n| setting, gate, seed | gold: start, best, end | | half lost at | alarm at |\n|---|---|---|---|---|")
    for one in outcomes:
        golds = f"{one.start:.2f} {one.best:.2f} {one.end:.2f}"
        alarms = ", ".join("none" if step is None else str(step) for step in one.alarms.values())
        print(f"| {one.name} | {golds} | {one.kind} | {one.lost_at or ''} | {alarms} |")


def _lead(outcome: Outcome) -> int | None:
    """Steps from the alarm, with a log every step, to the loss of half of the gain; negative where it came after."""
    alarm = outcome.alarms[_INTERVALS[0]]
    return None if alarm is None or outcome.lost_at is None else outcome.lost_at - alarm
