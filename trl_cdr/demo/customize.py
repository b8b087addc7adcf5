"""The demo of criteria: does saying what is wanted, to the scoring pair alone, make better labels and a better policy?

`run_customize` is `trl-cdr demo --customize`. On the steerable pair it measures how often the ratio prefers the right
one of two completions under each kind of conditioning, whether a style can be asked for, and how well the strong model
tells domains; then it trains the policy on the plain and on the conditioned reward, by two seeds each. The policy sees
no criterion. Data come from `steering`, models from `models`, training and pairs from `story`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..conditioning.criteria import Criteria, DomainCriteria
from ..scoring.scorer import DensityRatioScorer
from ..training.reward import CDRReward
from . import models, steering, world
from .figure import draw_customize
from .story import Clock, Pair, preferred, sample_pairs, train_policy, versions

SEEDS = (0, 1)
_KINDS = {
    "none": "no criterion (the plain ratio)",
    "own_criterion": "the domain's own criterion",
    "foreign_criterion": "another domain's criterion",
    "own_exemplar": "an exemplar of the domain",
    "foreign_exemplar": "an exemplar of another domain",
}


def run_customize(output_dir: str | Path, *, cache: bool = True) -> dict[str, Any]:
    """Run the demo of criteria, print tables on stdout and write `customize.json` and `customize.png`.

    Args:
        output_dir (`str` or `Path`): Folder for the two files; made if missing.
        cache (`bool`): Take the models of an earlier run; `False` trains them again.

    Returns:
        `dict`: What `customize.json` holds: `accuracy` (shares of pairs, by conditioning), `style` (how often the brief
        one of two right completions is preferred), `router` (`accuracy`, `confusion`), `gold` (`start`, and a list by
        seed for `plain` and `conditioned`), `curves`, `settings`, `seconds`, `parts`, `versions`.

    Raises:
        OSError: the output folder can't be written.
        ConfigError: the cache can't.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with models.one_thread(), models.quiet():
        checkpoints = models.build_checkpoints(cache)
        pair = models.build_steerable(checkpoints, cache=cache)
        clock.lap("build")
        scorer = DensityRatioScorer(str(pair.strong), str(pair.weak), device="cpu")
        accuracy = measure_conditionings(scorer, sample_pairs(checkpoints.policy, seed=0))
        style = measure_style(scorer)
        router = measure_router(scorer)
        clock.lap("labels")
        plain = CDRReward(str(pair.strong), str(pair.weak), device="cpu", name="plain")
        rewards = {
            "plain": plain,
            "conditioned": CDRReward(
                share=plain, name="conditioned", criteria=steering.make_criteria(), router="column:domain"
            ),
        }
        curves: dict[str, list[dict[str, list[float]]]] = {name: [] for name in rewards}
        for seed in SEEDS:
            for name, reward in rewards.items():
                curves[name].append(train_policy(checkpoints.policy, reward, name=f"{name} {seed}", seed=seed))
        clock.lap("training")
    draw_customize(accuracy, _KINDS, curves, folder / "customize.png")
    clock.lap("figure")
    summary = {
        "accuracy": accuracy,
        "style": style,
        "router": router,
        "gold": {"start": [curve["gold"][0] for curve in curves["plain"]]}
        | {name: [curve["gold"][-1] for curve in by_seed] for name, by_seed in curves.items()},
        "curves": curves,
        "settings": {"seeds": SEEDS, "recipe_version": models.RECIPE_VERSION},
        "seconds": round(sum(clock.parts.values()), 1),
        "parts": {part: round(seconds, 1) for part, seconds in clock.parts.items()},
        "versions": versions(),
    }
    (folder / "customize.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print_tables(summary, folder)
    return summary


def measure_conditionings(plain: DensityRatioScorer, pairs: list[Pair]) -> dict[str, float]:
    """How often the ratio prefers the right completion of a pair, by what the models were shown. `pairs`: how many."""
    criterion = steering.make_criteria()
    exemplar = steering.make_criteria(instructions=False, num_exemplars=1)
    own = [pair.domain for pair in pairs]
    foreign = [steering.other_domain(domain) for domain in own]
    shown: dict[str, tuple[Criteria | None, list[str]]] = {
        "none": (None, own),
        "own_criterion": (criterion, own),
        "foreign_criterion": (criterion, foreign),
        "own_exemplar": (exemplar, own),
        "foreign_exemplar": (exemplar, foreign),
    }
    accuracy: dict[str, float] = {"pairs": len(pairs)}
    for name, (criteria, domains) in shown.items():
        scorer = DensityRatioScorer(share=plain, criteria=criteria)
        scores = scorer.score(
            [pair.prompt for pair in pairs for _ in range(2)],
            [one.text for pair in pairs for one in (pair.right, pair.wrong)],
            finished=[one.finished for pair in pairs for one in (pair.right, pair.wrong)],
            domains=[domain for domain in domains for _ in range(2)],
        )
        values: list[Any] = [score.value for score in scores]
        accuracy[name] = preferred(values[0::2], values[1::2])
    return accuracy


def measure_style(plain: DensityRatioScorer) -> dict[str, float]:
    """How often the brief one of two right completions is preferred: without a criterion, and under each style's."""
    rows = [(world.conversation(task), _forms(task)) for task in world.HELD_OUT]
    criteria = steering.STYLES | Criteria({"none": DomainCriteria()})
    scorer = DensityRatioScorer(share=plain, criteria=criteria)
    shares = {}
    for name in criteria.domains:
        scores = scorer.score(
            [prompt for prompt, _ in rows for _ in range(2)],
            [text for _, forms in rows for text in forms],
            domains=[name] * (2 * len(rows)),
        )
        values: list[Any] = [score.value for score in scores]
        shares[name] = preferred(values[0::2], values[1::2])
    return shares


def measure_router(plain: DensityRatioScorer) -> dict[str, Any]:
    """How well the strong model tells the domains of held-out prompts by the likelihood of their names."""
    scorer = DensityRatioScorer(share=plain, criteria=steering.make_criteria(), router="likelihood")
    table = scorer.confusion(
        [world.conversation(task) for task in world.HELD_OUT], [task.domain for task in world.HELD_OUT]
    )
    right = sum(found.get(domain, 0) for domain, found in table.items())
    return {"accuracy": right / len(world.HELD_OUT), "confusion": table}


def _forms(task: world.Task) -> tuple[str, str]:
    """A brief and a detailed right completion."""
    brief = next(text for text in task.right if steering.is_brief(text))
    detailed = next(text for text in task.right if not steering.is_brief(text))
    return brief, detailed


def _print_tables(summary: Mapping[str, Any], folder: Path) -> None:
    accuracy, gold, style = summary["accuracy"], summary["gold"], summary["style"]
    labels = Table("both models are shown", "prefers the right one")
    for name, label in _KINDS.items():
        labels.add_row(label, f"{accuracy[name]:.1%}")
    training = Table("reward", *(f"gold, seed {seed}" for seed in SEEDS))
    for name, label in {"start": "(before training)", "plain": "plain", "conditioned": "conditioned"}.items():
        training.add_row(label, *(f"{value:.2f}" for value in gold[name]))
    console = Console()
    console.print(
        f"Which of two completions is right? {accuracy['pairs']} pairs that the policy wrote", labels, sep="\n"
    )
    console.print(
        f"Of two right completions the brief one is preferred in {style['none']:.0%} of cases, under 'be brief .' in "
        f"{style['brief']:.0%}, under 'be detailed .' in {style['detailed']:.0%}.",
        f"The strong model tells the domain of {summary['router']['accuracy']:.1%} of held-out prompts (chance: 33 %).",
        soft_wrap=True,
        sep="\n",
    )
    console.print("Gold reward after online DPO; the policy is shown no criterion", training, sep="\n")
    console.print(f"{summary['seconds']:.0f} s. Wrote customize.json and customize.png to {folder}", soft_wrap=True)
