"""What does a policy converge to? The optimum by weighted samples, and where TRL's trainers end.

A policy that is paid the log-ratio, and pays `beta` for each nat of KL divergence from a reference, is at its best as

    optimum(y | x) ~ reference(y | x) * (p_strong(y | x) / p_weak(y | x)) ** (1 / beta)

which is the strong model itself where `beta` is 1 and the reference is the weak model. `run_optimum` is `trl-cdr bench
--workload optimum`. It looks at that policy without training it, through samples of the reference that are weighted,
and trains the tiny world's models towards it. The gate is off throughout: the reward is in nats.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ..scoring.scorer import DensityRatioScorer
from ..training.reward import CDRReward
from . import models, world
from .gaming import Setting, make_settings
from .story import train_with, versions

BETAS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)
SAMPLES = 256
"""Completions to a prompt that are weighted."""

STEPS = 128
COMPLETIONS = 64
"""Of a step; together 8,192."""

_JUDGED = {"per_prompt": 64, "seed": 2}
"""How a model is judged: by so many completions to a prompt, from another seed than any run's."""

_TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
_UNSCALED: dict[str, Any] = {"scale_rewards": "none"}
_REVERSE: dict[str, Any] = {"use_bias_correction_kl": True}  # TRL's default in 1.16, not in 1.0
_FORWARD: dict[str, Any] = {"use_bias_correction_kl": False}


@dataclass(frozen=True)
class Run:
    """
    One way to train: from the `weak` model or from the `policy`, which is also the reference that `beta` weighs.

    `options` are the trainer's own, beside those that all runs share.
    """

    label: str
    start: Literal["weak", "policy"]
    trainer: Literal["grpo", "rloo"]
    beta: float
    options: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1)


RUNS = (
    Run("GRPO, unscaled, reverse KL", "weak", "grpo", 1.0, _UNSCALED | _REVERSE),
    Run("GRPO, unscaled, forward KL", "weak", "grpo", 1.0, _UNSCALED | _FORWARD, seeds=(0,)),
    Run("GRPO, scaled, reverse KL", "weak", "grpo", 1.0, _REVERSE),
    Run("RLOO", "weak", "rloo", 1.0, {}),
    Run("GRPO, scaled, no reference (the default)", "policy", "grpo", 0.0, {}),
    *(Run("GRPO, scaled, reverse KL", "policy", "grpo", beta, _REVERSE) for beta in (0.5, 1.0)),
    *(Run("GRPO, unscaled, reverse KL", "policy", "grpo", beta, _UNSCALED | _REVERSE) for beta in (0.1, 0.5, 1.0)),
    *(Run("GRPO, unscaled, forward KL", "policy", "grpo", beta, _UNSCALED | _FORWARD, (0,)) for beta in (0.5, 1.0)),
    *(Run("RLOO", "policy", "rloo", beta, {}) for beta in (0.05, 0.5, 1.0)),  # 0.05 is its default
)


@dataclass(frozen=True)
class Samples:
    """What a model wrote to the held-out prompts; B prompts, G completions each."""

    prompts: list[list[world.Message]]  # B
    groups: list[list[models.Sample]]  # B lists of G

    def gold(self) -> Tensor:
        """Gold reward, 0 or 1: (B, G)."""
        rows = zip(self.prompts, self.groups, strict=True)
        return torch.tensor([[world.gold(prompt, one.text, one.finished) for one in group] for prompt, group in rows])

    def log_ratio(self, strong: Path, weak: Path) -> Tensor:
        """Log-probability under one model minus that under another, nats: (B, G)."""
        rows = [(prompt, one) for prompt, group in zip(self.prompts, self.groups, strict=True) for one in group]
        scores = DensityRatioScorer(str(strong), str(weak), device="cpu", gate="none").score(
            [prompt for prompt, _ in rows], [one.text for _, one in rows], finished=[one.finished for _, one in rows]
        )
        return torch.tensor([score.value for score in scores], dtype=torch.float64).view(len(self.prompts), -1)


def draw(model: Path, *, per_prompt: int, seed: int) -> Samples:
    """Let a checkpoint write to every held-out prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [world.conversation(task) for task in world.HELD_OUT]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    return Samples(prompts, models.sample(loaded, tokenizer, prompts=prompts, per_prompt=per_prompt, seed=seed))


def weigh(log_ratio: Tensor, *, beta: float) -> Tensor:
    """
    What each sample of a reference counts for the optimum: `(ratio) ** (1 / beta)`, normalised for each prompt.

    Args:
        log_ratio (`Tensor`): Strong over weak, nats: (B, G).
        beta (`float`): Weight of the KL divergence; `inf` leaves the reference as it is.

    Returns:
        `Tensor`: (B, G), rows that sum to 1.
    """
    return torch.softmax(log_ratio / beta, dim=-1)


def effective(weights: Tensor) -> Tensor:
    """How many samples weigh as much as these, `1 / sum of squares`: (B, G) -> (B,), between 1 and G."""
    return 1 / weights.square().sum(dim=-1)


def measure_weighted(
    setting: Setting, reference: Path, *, betas: Sequence[float] = BETAS, per_prompt: int = SAMPLES, seed: int = 0
) -> dict[float, dict[str, float]]:
    """
    The optimum over a reference without training: its samples, weighted.

    Returns:
        `dict`: by beta, `inf` (the reference itself) first: `gold`, the optimum's gold reward; `effective` and
        `fewest`, the effective samples of a prompt, their mean and the lowest. Where these are few, the optimum lies
        in texts that the reference all but never writes, and `gold` says no more than that.
    """
    samples = draw(reference, per_prompt=per_prompt, seed=seed)
    gold, log_ratio = samples.gold(), samples.log_ratio(setting.strong, setting.weak)
    found = {}
    for beta in (math.inf, *betas):
        weights = weigh(log_ratio, beta=beta)
        count = effective(weights)
        found[beta] = {
            "gold": (weights * gold).sum(dim=1).mean().item(),
            "effective": count.mean().item(),
            "fewest": count.min().item(),
        }
    return found


def train(setting: Setting, run: Run, *, seed: int, steps: int = STEPS) -> dict[str, float]:
    """
    Train by one run, and judge the policy that came of it on the held-out prompts.

    Returns:
        `dict`: `gold`; `log_ratio`, what the policy was paid a completion (mean, nats); `kl`, how far it went from
        where it started (nats). `log_ratio - beta * kl` is what the optimum has most of; from the weak model with
        beta 1 it is minus the KL divergence from the strong model, which is the optimum there.
    """
    trainer, config = _TRAINERS[run.trainer]
    start = getattr(setting, run.start)
    with tempfile.TemporaryDirectory() as scratch:
        trained = Path(scratch) / "trained"
        train_with(
            start,
            CDRReward(str(setting.strong), str(setting.weak), device="cpu", gate="none"),
            trainer=trainer,
            config=config,
            name=f"{run.trainer}, beta {run.beta:g}, seed {seed}",
            seed=seed,
            steps=steps,
            evaluate_every=steps,
            keep=trained,
            learning_rate=1e-3,
            beta=run.beta,
            num_generations=8,
            per_device_train_batch_size=COMPLETIONS,
            max_completion_length=models.MAX_NEW_TOKENS,
            **run.options,
        )
        return judge(setting, trained, start=start)


def judge(setting: Setting, trained: Path, *, start: Path) -> dict[str, float]:
    """What `train` returns, of a policy that was trained from `start`."""
    samples = draw(trained, **_JUDGED)
    return {
        "gold": samples.gold().mean().item(),
        "log_ratio": samples.log_ratio(setting.strong, setting.weak).mean().item(),
        "kl": samples.log_ratio(trained, start).mean().item(),
    }


def run_optimum() -> dict[str, Any]:
    """
    Weigh the samples of two references, and train from each.

    Returns:
        `dict`: `weighted` (by reference, then by beta as text, see `measure_weighted`), `strong` (gold reward of the
        strong model's own samples), `runs` (`label`, `start`, `beta` and `seeds`: see `train`, one for each seed),
        `steps` and `versions`.
    """
    with models.one_thread(), models.quiet():
        setting = make_settings()["dpo"]
        weighted = {name: measure_weighted(setting, getattr(setting, name)) for name in ("weak", "policy")}
        strong = draw(setting.strong, **_JUDGED).gold().mean().item()
        runs = [
            {
                "label": run.label,
                "start": run.start,
                "beta": run.beta,
                "seeds": [train(setting, run, seed=seed) for seed in run.seeds],
            }
            for run in RUNS
        ]
    return {
        "workload": "optimum",
        "weighted": {name: {f"{beta:g}": row for beta, row in rows.items()} for name, rows in weighted.items()},
        "strong": strong,
        "runs": runs,
        "steps": STEPS,
        "versions": versions(),
    }


def print_optimum(result: dict[str, Any]) -> None:
    """The result on stdout as two Markdown tables: the weighted samples, and the trained policies."""
    weighted = result["weighted"]
    print(f"| beta | {' | '.join(f'gold, from {name} | effective samples (fewest)' for name in weighted)} |")
    print("|---" * (2 * len(weighted) + 1) + "|")
    for beta in next(iter(weighted.values())):
        cells = [
            f"{row['gold']:.2f} | {row['effective']:.0f} ({row['fewest']:.1f})"
            for row in (rows[beta] for rows in weighted.values())
        ]
        print(f"| {beta} | {' | '.join(cells)} |")
    print(f"\nThe strong model's own samples: {result['strong']:.2f}\n")
    columns = ("gold", "log-ratio", "KL from the start", "log-ratio - beta x KL")
    print(f"| trained for {result['steps']} steps | from | beta | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 3) + "|")
    for run in result["runs"]:
        beta = run["beta"]
        rows = [(one["gold"], one["log_ratio"], one["kl"], one["log_ratio"] - beta * one["kl"]) for one in run["seeds"]]
        cells = [" ".join(f"{value:.2f}" for value in column) for column in zip(*rows, strict=True)]
        print(f"| {run['label']} | {run['start']} | {beta:g} | {' | '.join(cells)} |")
