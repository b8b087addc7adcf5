"""What labelled, beside whatever a trainer writes: a file in its folders and a section in its model cards.

`reward` adds it to GRPO and RLOO by itself, `callback` to every trainer. Touches no model.
"""

import functools
import json
import logging
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from .. import _compat
from ..config import shareable_name, shareable_options

if TYPE_CHECKING:
    from .reward import CDRReward

logger = logging.getLogger(__name__)

PROVENANCE = "cdr_labeling.json"


class ProvenanceCallback(TrainerCallback):  # type: ignore[misc]
    """
    Writes `cdr_labeling.json` into the output folder when training begins, so that the final model has it, saved or
    pushed, and into every checkpoint; once it has joined a trainer, also into other folders that the model is saved to,
    and a section into the model cards.

    What labels is asked once, when its pair is loaded. A record that can't be written is a warning: it stands before no
    save and no push of a model.

    Args:
        reward (`CDRReward`): What labels; of a trainer that it has joined, all such rewards are recorded.
    """

    def __init__(self, reward: "CDRReward") -> None:
        self.reward = reward
        self._joined: Any = None
        self._records: list[dict[str, Any]] = []

    def join(self, trainer: Any) -> None:
        """Record all rewards of a trainer from now on, wherever it saves the model and in its model cards."""
        rewards = self._rewards(trainer)
        for reward in rewards:
            if reward.config.cdr_share_policy:  # one that has not been called yet
                reward.attach(trainer)
        self._ask(rewards)
        if trainer.is_world_process_zero():
            self._write(Path(trainer.args.output_dir))
        if self._joined is trainer:
            return
        self._joined = trainer
        # No event comes between a save, or a card, and its upload, and none tells of a model saved elsewhere.
        save, write = trainer.save_model, trainer.create_model_card

        @functools.wraps(save)
        def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            if trainer.args.should_save:
                self._write(Path(output_dir or trainer.args.output_dir))
            save(output_dir, *args, **kwargs)

        @functools.wraps(write)
        def create_model_card(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            if trainer.is_world_process_zero():
                self._describe(Path(trainer.args.output_dir) / "README.md")

        trainer.save_model, trainer.create_model_card = save_model, create_model_card

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if not self._records:
            self._ask([self.reward])
        if state.is_world_process_zero:
            self._write(Path(args.output_dir))

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _rewards(self, trainer: Any) -> list["CDRReward"]:
        found = [_compat.cdr_reward(function) for function in _compat.reward_functions(trainer)]
        rewards = [reward for reward in found if reward is not None]
        return rewards if self.reward in rewards else [self.reward, *rewards]

    def _ask(self, rewards: Sequence["CDRReward"]) -> None:
        """A process without a pair knows nothing, and writes nothing: the main one has it."""
        self._records = [provenance(reward) for reward in rewards if reward.scorer.ranks.holds_pair]

    def _write(self, folder: Path) -> None:
        first, *others = self._records
        text = json.dumps(first | ({"others": others} if others else {}), indent=2)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / f".{PROVENANCE}"
            scratch.write_text(text + "\n", encoding="utf-8")
            scratch.replace(folder / PROVENANCE)
        except OSError as error:
            logger.warning("%s can't be written into %s: %s.", PROVENANCE, folder, error)

    def _describe(self, card: Path) -> None:
        section = labelling_section(self._records, trainer=type(self._joined).__name__, loss=_loss(self._joined.args))
        try:
            text = card.read_text(encoding="utf-8")
            if section not in text:
                card.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")
        except OSError as error:
            logger.warning("%s does not say how the model was labelled: %s.", card, error)


def resume_date(reward: "CDRReward", args: TrainingArguments, state: TrainerState) -> None:
    """
    Render chat templates with the date on which a resumed run began, which its checkpoint records.

    Args:
        reward (`CDRReward`): Nothing happens if its `cdr_date` is set.
        args (`TrainingArguments`), state (`TrainerState`): The trainer's. At step 0 a run begins.
    """
    if reward.config.cdr_date is not None or not state.global_step:
        return
    path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / PROVENANCE
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        records = [first, *first.get("others", [])]
        recorded = next(record.get("date") for record in records if record["name"] == reward.__name__)
    except (OSError, ValueError, LookupError, StopIteration):
        return
    if recorded is not None:
        reward.scorer.use_date(date.fromisoformat(recorded))


def provenance(reward: "CDRReward") -> dict[str, Any]:
    """What labelled: the reward's options, which weights its models had, its criteria, the versions."""
    criteria = reward.scorer.criteria
    described = reward.scorer.describe()
    return {
        "name": reward.__name__,
        "config": shareable_options(reward.config),
        "models": {
            role: {
                key: described[role][key] for key in ("name", "weights", "adapter", "adapter_weights", "dtype", "way")
            }
            for role in ("strong", "weak")
        },
        "criteria_sha256": None if criteria is None else criteria.digest,
        "chat_template_kwargs": described["chat_template_kwargs"],
        "date": described["date"],
        "versions": _compat.versions(),
    }


def labelling_section(records: Sequence[dict[str, Any]], *, trainer: str, loss: str | None) -> str:
    """
    The section of a model card that says how the model was labelled, in Markdown.

    Args:
        records (`Sequence[dict]`): What `provenance` says of each reward.
        trainer (`str`): The trainer's class.
        loss (`str`, *optional*): The name of its loss.
    """
    rows: dict[str, list[str]] = {"strong": [], "weak": [], "gate": [], "criteria": []}
    for record in records:
        config, models = record["config"], record["models"]
        for role in ("strong", "weak"):
            rows[role].append(_show(models[role]["name"], models[role]["weights"]))
            if models[role].get("adapter"):
                adapter = _show(models[role]["adapter"], models[role]["adapter_weights"])
                rows[role][-1] += f", with the adapter {adapter}"
        gate = "none: the plain ratio" if config["cdr_gate"] == "none" else config["cdr_gate"]
        rows["gate"].append(f"{gate} {config['cdr_typicality']}" if config["cdr_typicality"] else gate)
        criteria = "none"
        if record["criteria_sha256"] is not None:
            rule = config["cdr_router"] or config["cdr_domain"]
            digest = record["criteria_sha256"][:12]
            criteria = f"`{shareable_name(config['cdr_criteria'])}` (SHA-256 `{digest}`)"
            criteria += f", domain: `{rule}`" if rule else ""
        rows["criteria"].append(criteria)
    names = " | ".join(f"`{record['name']}`" for record in records)
    table = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())
    return (
        "## How it was labelled\n\n"
        f"`{trainer}`{f' (loss `{loss}`)' if loss else ''} learnt from labels that trl-cdr "
        f"{records[0]['versions']['trl-cdr']} computed inside the training step: the log-density ratio of a strong "
        "over a weak model ([arXiv 2411.02481](https://arxiv.org/abs/2411.02481)). All options are in "
        f"`{PROVENANCE}`.\n\n"
        f"| | {names} |\n|---|{'---|' * len(records)}\n{table}\n"
    )


def _show(name: str, weights: str | None) -> str:
    """A model's or an adapter's name, and which weights it stood for."""
    if weights is None:
        return f"`{shareable_name(name)}`"
    kind, digest = weights.split(" ")
    return f"`{shareable_name(name)}`, {kind} `{digest[:12]}`"


def _loss(args: Any) -> str | None:
    """What training arguments call their loss: `OnlinePreferenceConfig`'s, else TRL's."""
    loss = getattr(args, "preference_loss", None) or getattr(args, "loss_type", None)
    return None if loss is None else str(loss)
