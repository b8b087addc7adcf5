"""Does it work on a language model? Labels, criteria, the gate and online training on a real pair, judged by gold.

`run_demo` is `trl-cdr demo --real`: the pair is built and its labels are measured. `run_real` is
`trl-cdr bench --workload real`: the same, then criteria, the gate, and policies trained online. Each part's result is a
JSON file in the output folder, and a part whose file is there is not run again: a stopped run goes on.

The tasks are `real_world`'s, the models `real_models`'. No reward sees gold but gold itself, the upper bound.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..annotation.attacks import ATTACKS
from ..annotation.probe import GATES
from ..scoring.checkpoint import identify_weights
from ..scoring.scorer import DensityRatioScorer
from ..training.reward import CDRReward
from . import real_gate, real_labels, real_models, real_training, real_world
from .figure import draw_labels, draw_training
from .models import Sample, quiet
from .parts import Parts
from .smollm import build_smollm
from .story import Reward, random_reward, versions

SEEDS = (0, 1)
REWARDS = {"surprise": SEEDS, "gold": SEEDS, "random": SEEDS, "none": SEEDS, "typicality": SEEDS[:1]}
"""The pair's reward behind a gate, gold itself (the upper bound), and a control, each with its seeds."""
# Tasks that strong is tuned on, held-out tasks of unseen kinds (of every kind alike), completions to a held-out task.
_DEMO: dict[str, Any] = {"tasks": 228, "unseen": 48, "samples": 3}
_WHOLE: dict[str, Any] = {
    "tasks": len(real_world.TRAIN),
    "unseen": len(real_world.HELD_OUT_UNSEEN),
    "samples": 8,
    "again": True,
}


class Lab:
    """A model, the pair made of it, and what is measured on them. Every part's result is kept, see `Parts`."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        model: str | None,
        data: str | None,
        tasks: int,
        unseen: int,
        samples: int,
        cache: bool,
        again: bool = False,
    ) -> None:
        self.weak = str(build_smollm(cache=cache)) if model is None else model
        self._unseen = unseen
        self._samples = samples
        self._again = again
        self.parts = Parts(
            Path(output_dir),
            {
                "model": model or "SmolLM2-135M-Instruct",
                "weights": identify_weights(self.weak, "model"),
                "data": data and real_models.identify_data(data),
                "recipe": real_models.RECIPE_VERSION,
                "tasks": tasks,
                "unseen": unseen,
                "samples": samples,
                "versions": versions(),
            },
        )
        self.strong = str(real_models.build_strong(self.weak, tasks=tasks, data=data, cache=cache))
        # The cache may be another one than at the run's start, and a strong model that is tuned again is another model.
        self.parts.keep("strong.json", {"strong": identify_weights(self.strong, "strong")})
        self.tuning = json.loads((Path(self.strong) / "tuning.json").read_text(encoding="utf-8"))

    def labels(self) -> dict[str, Any]:
        """See `real_labels.measure_labels`; for seen and unseen kinds."""
        scorer = self._scorer(gate="surprise")
        seen = {"seen": real_world.HELD_OUT}
        if self._again:
            seen |= {"again": real_world.HELD_OUT_AGAIN, "more": real_world.HELD_OUT_MORE}
        return {
            "seen": self._labels(scorer, "seen", seen),
            "unseen": self._labels(scorer, "unseen", {"unseen": real_world.HELD_OUT_UNSEEN[: self._unseen]}),
        }

    def _labels(self, scorer: DensityRatioScorer, name: str, parts: dict[str, list[real_world.Task]]) -> Any:
        tasks = [task for some in parts.values() for task in some]
        groups = [
            group
            for part, some in parts.items()
            for group in self._written(f"samples-{part}", [task.prompt for task in some])
        ]
        return self.parts.run(f"labels-{name}", lambda: real_labels.measure_labels(scorer, tasks, groups))

    def criteria(self) -> Any:
        """See `real_labels.measure_criteria`."""
        topics = list(dict.fromkeys(task.topic for task in real_world.HELD_OUT))
        groups = self._written("samples-bare", [real_world.ask(topic) for topic in topics], per_prompt=16)
        return self.parts.run(
            "criteria", lambda: real_labels.measure_criteria(self._scorer(gate="none"), topics, groups)
        )

    def gates(self) -> Any:
        """See `real_gate`; `honest` and `attacks`."""
        tasks = real_world.HELD_OUT
        prompts = [task.prompt for task in tasks]
        groups = {
            f"the strong model's own, T = {temperature}": self._written(
                f"samples-strong-{temperature}", prompts, per_prompt=1, model=self.strong, temperature=temperature
            )
            for temperature in (0.7, 1.0, 1.3)
        }
        policys = self._written("samples-seen", prompts)
        groups["the policy's own, T = 1.0"] = [group[:2] for group in policys]

        def measure() -> dict[str, Any]:
            typicality = self._scorer(gate="typicality")
            scorers = {"typicality": typicality, "surprise": DensityRatioScorer(share=typicality, gate="surprise")}
            honest = {
                name: [
                    (task, one.text, one.finished) for task, group in zip(tasks, written, strict=True) for one in group
                ]
                for name, written in groups.items()
            }
            honest["written by hand"] = [(task, text, True) for task, text in real_world.WRITTEN]
            right = {  # one for each task
                task: one.text
                for task, group in zip(tasks, policys, strict=True)
                for one in group
                if real_world.gold(task, one.text, one.finished)
            }
            return {
                "honest": real_gate.measure_gates(scorers, honest),
                "attacks": real_gate.measure_attacks(scorers, list(right.items())),
            }

        return self.parts.run("gates", measure)

    def training(self) -> dict[str, Any]:
        """By loop, reward and seed; see `real_training.train_policy`. `start` is the policy before training."""
        start = partial(real_training.evaluate_start, self.weak, seeds=SEEDS)
        found = {"start": self.parts.run("train-start", start)}
        for loop in real_training.LOOPS:
            for reward, seeds in REWARDS.items():
                for seed in seeds:
                    name = f"train-{loop}-{reward}-{seed}"
                    found[name] = self.parts.run(name, partial(self._train, loop, reward, seed))
        return found

    def _train(self, loop: str, reward: str, seed: int) -> dict[str, Any]:
        function: Reward | None = None  # gold itself
        if reward == "random":
            function = random_reward(seed)
        elif reward != "gold":
            function = CDRReward(self.strong, self.weak, gate=reward, dtype="bfloat16", policy_tokenizer=self.weak)
        return real_training.train_policy(self.weak, function, loop=loop, seed=seed, name=f"{loop}, {reward}, {seed}")

    def _scorer(self, **options: Any) -> DensityRatioScorer:
        return DensityRatioScorer(self.strong, self.weak, **options)

    def _written(
        self,
        name: str,
        prompts: list[list[real_world.Message]],
        *,
        per_prompt: int | None = None,
        model: str | None = None,
        temperature: float = 1.0,
    ) -> list[list[Sample]]:
        """What a model wrote, by default the policy, which is the weak model itself."""

        def write() -> dict[str, Any]:
            groups = real_models.sample(
                real_models.load_policy(model or self.weak),
                real_models.load_tokenizer(self.weak),
                prompts,
                per_prompt=per_prompt or self._samples,
                seed=1,
                temperature=temperature,
                label=name,
            )
            return {"groups": [[[one.text, one.finished] for one in group] for group in groups]}

        groups = self.parts.run(name, write)["groups"]
        return [[Sample(text, finished) for text, finished in group] for group in groups]


def run_demo(
    output_dir: str | Path, *, model: str | None = None, data: str | None = None, cache: bool = True
) -> dict[str, Any]:
    """
    Build the real pair, measure its labels, print them, and write `summary.json` and `labels.png`.

    Args:
        output_dir (`str` or `Path`): Folder for the results; made if missing. Parts that are in it are not run again.
        model (`str`, *optional*): The weak model: an instruct model's name on the Hub or path. By default the packaged
            SmolLM2-135M-Instruct.
        data (`str`, *optional*): Preference pairs to tune the strong model on, see `real_models.build_strong`.
        cache (`bool`, *optional*, defaults to `True`): Take the models of an earlier run.

    Returns:
        `dict`: What `summary.json` holds: `labels` (`seen` and `unseen`, see `real_labels.measure_labels`), `tuning`,
        `settings`.

    Raises:
        ModelError: the model is not installed, or can't be loaded.
        ConfigError: peft is not installed, the cache can't be written, or the folder holds results of other settings.
    """
    with quiet():
        lab = Lab(output_dir, model=model, data=data, cache=cache, **_DEMO)
        labels = lab.labels()
    summary = {"labels": labels, "tuning": lab.tuning, "settings": lab.parts.settings}
    _finish(summary, lab.parts.folder)
    return summary


def run_real(
    output_dir: str | Path, *, model: str | None = None, data: str | None = None, cache: bool = True
) -> dict[str, Any]:
    """
    All parts: labels, criteria, gates, online training. Takes hours; a stopped run goes on where it was.

    Args:
        output_dir, model, data, cache: As for `run_demo`.

    Returns:
        `dict`: What `summary.json` holds: as for `run_demo`, and `criteria`, `gates`, `training`.

    Raises:
        as `run_demo`.
    """
    with quiet():
        lab = Lab(output_dir, model=model, data=data, cache=cache, **_WHOLE)
        summary = {
            "labels": lab.labels(),
            "criteria": lab.criteria(),
            "gates": lab.gates(),
            "training": lab.training(),
            "tuning": lab.tuning,
            "settings": lab.parts.settings,
        }
    draw_training(_curves(summary["training"]), lab.parts.folder / "training.png")
    _finish(summary, lab.parts.folder)
    return summary


def _curves(training: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """By loop and reward, the curve of each seed."""
    loops = {"online_dpo": "online DPO", "online_preference": "ours, SimPO"}
    return {
        label: {
            reward: [training[f"train-{loop}-{reward}-{seed}"]["curve"] for seed in seeds]
            for reward, seeds in REWARDS.items()
        }
        for loop, label in loops.items()
    }


def print_real(summary: dict[str, Any]) -> None:
    """What was measured, as Markdown tables on stdout."""
    for name, labels in summary["labels"].items():
        _print_table(
            [
                f"{name} kinds: prefers the right one",
                *(f"{labels[of]['pairs']} {what}" for of, what in real_labels.SETS.items()),
            ],
            [
                [label, *(_share(labels[of][judge]) for of in real_labels.SETS)]
                for judge, label in [*real_labels.JUDGES.items(), ("lead", "the ratio less strong's log-probability")]
            ],
        )
    if "criteria" in summary:
        names = ("none", "own", "other", "shorter")
        _print_table(
            ["condition as criterion", "pairs", "no criterion", "its own", "another", "the shorter one"],
            [
                [kind, str(row["pairs"]), *(_share(row[name]) for name in names)]
                for kind, row in summary["criteria"].items()
                if kind != "seconds"
            ],
        )
    if "gates" in summary:
        _print_gates(summary["gates"])
    if "training" in summary:
        _print_training(summary["training"])


def _print_gates(gates: dict[str, Any]) -> None:
    _print_table(
        ["honest text: gated by", "texts", *GATES[1:]],
        [
            [kind, str(row["texts"]), *(_share(row[gate]) for gate in GATES[1:])]
            for kind, row in gates["honest"].items()
        ],
    )
    _print_table(
        ["worth more than a right completion", *GATES],
        [[ATTACKS[name], *(_share(found[gate]["win"]) for gate in GATES)] for name, found in gates["attacks"].items()],
    )


def _print_training(training: dict[str, Any]) -> None:
    def cells(found: dict[str, Any]) -> list[str]:
        seen, unseen = found["seen"], found["unseen"]
        return [
            f"{seen['gold']:.2f}",
            f"{unseen['gold']:.2f}",
            f"{seen['words']:.1f}",
            f"{seen['repeats']:.2f}",
            f"{seen['finished']:.2f}",
        ]

    rows = [["start", str(seed), *cells(found)] for seed, found in enumerate(training["start"]["held_out"])]
    rows += [
        [f"{loop}, {reward}", str(seed), *cells(training[f"train-{loop}-{reward}-{seed}"]["held_out"])]
        for loop in real_training.LOOPS
        for reward, seeds in REWARDS.items()
        for seed in seeds
    ]
    _print_table(["policy", "seed", "gold, seen", "unseen", "words", "repeats", "finished"], rows)


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _share(interval: list[float] | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = interval
    return f"{mean:.0%} ({low:.0%} to {high:.0%})"


def _finish(summary: dict[str, Any], folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_labels(summary["labels"], real_labels.JUDGES, folder / "labels.png")
    print_real(summary)
    seconds = summary["tuning"]["seconds"]
    print(f"\nThe pair took {seconds} s to tune. Wrote summary.json and labels.png to {folder}")
