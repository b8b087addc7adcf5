"""CDRCallback: what a trainer does not do for a reward function. Touches no model's numbers; `metrics` counts.

The reward's metrics in online DPO, whose trainer hands over no `log_metric`; means by domain, which GRPO and RLOO could
not gather by key; the time that labelling takes; a record of what labelled beside every checkpoint; the pair loaded
before the first step.
"""

import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .. import _compat
from ..errors import ConfigError
from .completions_table import CompletionsTable
from .metrics import Call, call_metrics, domain_sums
from .reward import CDRReward

PROVENANCE = "cdr_labeling.json"


class CDRCallback(TrainerCallback):  # type: ignore[misc]
    """
    Metrics, provenance and an early start for a [`CDRReward`].

    - Loads the pair when training begins, so that the first step does not pay for it, and tells the reward the policy's
      tokenizer.
    - In online DPO logs the reward's metrics (`<name>/...`, see `call_metrics`), which GRPO and RLOO log by themselves.
    - With `trainer`, in every trainer, logs the mean reward of each domain (`<name>/rewards/<domain>`) and
      `<name>/step_share`, the share of the time since the last log that went into labelling.
    - Writes `cdr_labeling.json` into every checkpoint: options, revisions, a hash of the criteria, versions.

    What is logged reaches `state.log_history` and every reporting integration; over several processes it is a mean.

    Args:
        reward (`CDRReward`): One of the trainer's reward functions.
        trainer (`Trainer`, *optional*): The trainer that this is added to; required in online DPO.
        log_completions (`bool`, *optional*, defaults to `False`): In online DPO, print a sample of each log's
            completions and keep all of them under `completions` in the output folder; GRPO and RLOO have an option of
            their own for that.

    Raises:
        ConfigError: `reward` is no `CDRReward`. When training begins: the trainer does not use this reward, or uses two
            of one name; online DPO without `trainer`; the policy is the very module that scores.

    Example:

    ```python
    trainer = OnlineDPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    trainer.add_callback(CDRCallback(reward, trainer))
    ```
    """

    def __init__(self, reward: CDRReward, trainer: Any = None, *, log_completions: bool = False) -> None:
        if not isinstance(reward, CDRReward):
            raise ConfigError(f"reward is a {type(reward).__name__}. Pass the CDRReward that the trainer uses.")
        self.reward = reward
        self._trainer = trainer
        self._table = CompletionsTable() if log_completions else None
        self._calls: list[dict[str, float]] = []
        self._domains: dict[str, tuple[float, int]] = {}
        self._seconds = 0.0
        self._since = time.perf_counter()
        self._is_online_dpo = False

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._is_online_dpo = _compat.is_online_dpo(args)
        self._check(kwargs.get("model"))
        if self._trainer is not None:
            # Reporting integrations come before a user's callbacks: only who stands before them can add to a log.
            handler = self._trainer.callback_handler
            handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        if kwargs.get("processing_class") is not None:
            self.reward.scorer.use_policy_tokenizer(kwargs["processing_class"])
        self.reward.scorer.load()
        self.reward.observe(self._observe)
        self._since = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float] | None = None, **__: Any
    ) -> None:
        if self._trainer is None or logs is None or any(key.startswith(("eval_", "train_")) for key in logs):
            return
        added = self._collect()
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
        if self._table is not None and state.is_world_process_zero:
            self._table.flush(Path(args.output_dir) / "completions", step=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(provenance(self.reward), indent=2)
            (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")

    def _check(self, policy: Any) -> None:
        name = self.reward.__name__
        if self._trainer is None and self._is_online_dpo:
            raise ConfigError(
                "trainer is missing, and online DPO logs a reward's metrics only through it. Pass "
                "CDRCallback(reward, trainer)."
            )
        if self._trainer is not None and not any(f is self.reward for f in _compat.reward_functions(self._trainer)):
            raise ConfigError(
                f"the trainer does not use {name}. Pass the same object as reward_funcs= and to CDRCallback."
            )
        names = [f.__name__ for f in _compat.reward_functions(self._trainer) if isinstance(f, CDRReward)]
        if names.count(name) > 1:
            raise ConfigError(
                f"{len(names)} of the trainer's rewards are called {name}: their metrics would mix. Pass another name=."
            )
        inner = getattr(policy, "module", policy)
        if any(inner is model for model in self.reward.scorer.modules()):
            raise ConfigError(
                f"the policy is one of the models that {name} scores with: the reward would change with every step. "
                "Pass a copy, or the model's name."
            )

    def _observe(self, call: Call) -> None:
        if self._trainer is not None and not self._trainer.model.training:
            return  # an evaluation's
        self._seconds += call.seconds
        for domain, (total, count) in domain_sums(call).items():
            before = self._domains.get(domain, (0.0, 0))
            self._domains[domain] = (before[0] + total, before[1] + count)
        if self._is_online_dpo:
            self._calls.append(call_metrics(call))
            if self._table is not None:
                self._table.add(call)

    def _collect(self) -> dict[str, float]:
        """What has gathered since the last log, over all processes."""
        now = time.perf_counter()
        share = self._seconds / (now - self._since)
        mine = [{"calls": self._calls, "domains": self._domains, "share": share}]
        self._calls, self._domains, self._seconds, self._since = [], {}, 0.0, now
        ranks = gather_object(mine)
        calls = [call for rank in ranks for call in rank["calls"]]
        values = {key: sum(call[key] for call in calls) / len(calls) for key in (calls[0] if calls else {})}
        sums: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for rank in ranks:
            for domain, part in rank["domains"].items():
                sums[domain].append(part)
        for domain, parts in sorted(sums.items()):
            values[f"rewards/{domain}"] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        values["step_share"] = sum(rank["share"] for rank in ranks) / len(ranks)
        return {f"{self.reward.config.cdr_name}/{key}": value for key, value in values.items()}


def provenance(reward: CDRReward) -> dict[str, Any]:
    """What labelled: the reward's options, the revisions that its models were loaded at, its criteria, the versions."""
    criteria = reward.scorer.criteria
    described = reward.scorer.describe()
    return {
        "name": reward.__name__,
        "config": asdict(reward.config),
        "models": {
            role: {key: described[role][key] for key in ("name", "revision", "dtype", "way")}
            for role in ("strong", "weak")
        },
        "criteria_sha256": None if criteria is None else criteria.digest,
        "versions": _compat.versions(),
    }
