"""What `trl-cdr rounds` asks for: how many rounds, of which prompts, and TRL's configs of the training in each.

Names are those of `train`, `annotate` and TRL. `cpo_config` and `dpo_config` are the configs, imported when asked for.
"""

import re
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, Literal, get_args

from ..annotation.annotate import AnnotateArguments
from ..errors import ConfigError

TrainerName = Literal["cpo", "dpo"]
Prompts = Literal["split", "all"]
_HOMES = {"cpo": ("trl.experimental.cpo", "CPOTrainer"), "dpo": ("trl", "DPOTrainer")}


@dataclass
class RoundsArguments:
    """
    How many rounds, what each takes of the prompts, and which of TRL's trainers learns from the pairs. The trainer's
    config reads the arguments of training, so that this one is read first.

    Raises:
        ConfigError: a value is out of range.
    """

    num_rounds: int = field(
        default=3, metadata={"help": "How often: completions by the policy, their labels, training on them."}
    )
    round_prompts: Prompts = field(
        default="split",
        metadata={
            "help": "split: each prompt is of one round, which gets every num_rounds-th. all: every round has all of "
            "them, with other draws; then more rounds can be added to a run that is finished."
        },
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of the input whose prompts are held out: labelled in every round, never trained on. Their "
            "reward is in the summary, and eval_strategy evaluates on their pairs."
        },
    )
    trainer: TrainerName = field(
        default="cpo",
        metadata={
            "help": "TRL's trainer, whose config's fields are arguments of this command. cpo: with loss_type simpo, "
            "its default here. dpo: with the policy at the start of the round as reference."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.num_rounds, int) or self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds!r}: it counts rounds. Use 1 or more.")
        for name, known in (("round_prompts", get_args(Prompts)), ("trainer", get_args(TrainerName))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}. Use one of: {', '.join(known)}.")

    @property
    def share(self) -> int:
        """A round gets every so-many-th prompt."""
        return self.num_rounds if self.round_prompts == "split" else 1

    @property
    def config_class(self) -> type:
        """The config's class, a `CPOConfig` or a `DPOConfig`."""
        module = import_module(f".{self.trainer}_config", package=__package__)
        return getattr(module, f"Round{self.trainer.upper()}Config")  # type: ignore[no-any-return]

    @property
    def trainer_class(self) -> type:
        """TRL's `CPOTrainer` or `DPOTrainer`."""
        module, name = _HOMES[self.trainer]
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


@dataclass
class PairsArguments(AnnotateArguments):
    """
    The prompts, and how pairs are made of them: the arguments of `annotate`, but for those that a round sets itself.

    Raises:
        ConfigError: a value is out of range.
    """

    input: str = field(
        metadata={
            "help": "Prompts: a .jsonl (or .jsonl.gz, .parquet, .json, .csv) file, a folder of such, or a name on the "
            "Hub. Each row holds prompt (messages, or a string: one user turn) and may hold domain."
        }
    )
    output_dir: str = field(init=False, default="")
    policy: str | None = field(init=False, default=None)
    policy_revision: str | None = field(init=False, default=None)
    server: str | None = field(init=False, default=None)
    seed: int = field(init=False, default=0)
    shard: str = field(init=False, default="0/1")
    push_to_hub: str | None = field(init=False, default=None)


@dataclass
class OfARound:
    """What a round's training has otherwise than TRL: its own defaults, and fields that are no arguments here."""

    output_dir: str | None = field(
        default="./trl-cdr-rounds",
        metadata={"help": "Folder of all rounds. A run that was stopped, however, goes on from here."},
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "How often a round goes through its pairs, unless max_steps is set."}
    )
    resume_from_checkpoint: str | None = field(init=False, default=None)
    push_to_hub: bool = field(init=False, default=False)
    max_completion_length: int | None = field(init=False, default=None)


# Fields of `train`, `annotate` and TRL that are no arguments of this command, and why.
ELSEWHERE: dict[str, str] = {
    "resume_from_checkpoint": "a run always goes on where it was",
    "push_to_hub": "nothing is pushed; hf upload NAME output_dir/round-N/policy pushes a policy",
    "policy": "the policy is model_name_or_path, later what the round before it trained",
    "policy_revision": "it is model_revision",
    "server": "the policy changes from round to round, and is run here",
    "shard": "a round has to be whole before it trains; several processes share it under accelerate launch",
    "dataset_name": "the prompts are input",
}


def arguments_of_a_round(arguments: PairsArguments, **own: Any) -> AnnotateArguments:
    """
    What a round annotates with.

    Args:
        arguments (`PairsArguments`): Of all rounds.
        **own: Those that the round sets itself.
    """
    shared = {each.name: getattr(arguments, each.name) for each in fields(PairsArguments) if each.init}
    return AnnotateArguments(**shared, **own)


def known_losses(training_args: Any) -> list[str]:
    """
    The names that TRL's installed version takes for `loss_type`; they are checked where the loss is computed, which is
    after a round's labels.

    Args:
        training_args (`TrainingArguments`): A `CPOConfig`, which has choices, or a `DPOConfig`, whose help lists them.
    """
    metadata = type(training_args).__dataclass_fields__["loss_type"].metadata
    return list(metadata.get("choices") or re.findall(r"`'(\w+)'`", str(metadata.get("help"))))
