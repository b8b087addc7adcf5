"""Set a reward up for a trainer: read what the trainer decides, check it, load the pair. Scores and logs nothing.

`reward` does this in a trainer's first call, `callback` when training begins.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerState, TrainingArguments

from .. import _compat
from ..scoring.together import load_together
from .checks import check_domains, check_name, check_policy, trainer_datasets
from .provenance import resume_date

if TYPE_CHECKING:
    from .reward import CDRReward


@dataclass(frozen=True)
class KnownTrainer:
    """The parts of a trainer that transformers hands to a callback, for a callback that was given no trainer."""

    args: TrainingArguments
    state: TrainerState
    model: Any
    processing_class: Any


def set_up(reward: "CDRReward", trainer: Any) -> None:
    """
    Read from a trainer all that scores depend on, check it, and load the pair. Waits for all processes.

    Read are: the policy's tokenizer and the tokens at which its generation ends; the variables and tools of the chat
    template; BOS before string prompts; the date of a resumed run; the dtype (`cdr_dtype="auto"`); with
    `cdr_share_policy` the policy.

    Args:
        reward (`CDRReward`): The reward.
        trainer (`Trainer` or `KnownTrainer`): The trainer.

    Raises:
        ConfigError: another reward has this name; the policy is a model of the pair; the trainer's chat template
            variables differ from `cdr_chat_template_kwargs`; strong and weak have the same weights.
        InputError: a data set lacks the router's column, or names an unknown domain in it.
        ModelError: the pair can't be loaded, or has other weights in another process.
    """
    name, scorer = reward.__name__, reward.scorer
    check_name(name, trainer)
    check_policy(name, trainer.model, scorer.modules())
    check_domains(scorer.router, trainer_datasets(trainer))
    if trainer.processing_class is not None:
        scorer.use_policy_tokenizer(trainer.processing_class, end_ids=_compat.generation_ends(trainer))
    adds_bos = not _compat.is_online_dpo(trainer.args)
    scorer.use_conversations(*_compat.conversation_arguments(trainer), adds_bos=adds_bos)
    scorer.use_dtype(scorer.config.choose_dtype(trainer.args))
    resume_date(reward, trainer.args, trainer.state)
    if reward.config.cdr_share_policy:
        scorer.use_policy(_compat.unwrapped_policy(trainer))
    load_together(scorer)
