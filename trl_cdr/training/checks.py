"""Checks when a reward and its trainer meet, before anything is scored: names, the policy, domains, prompts."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import _compat
from ..conditioning.router import Router
from ..errors import ConfigError
from ..scoring.encoding import Encoder, vocabulary_hash
from ..scoring.scorer import DensityRatioScorer
from ..scoring.types import Prompt, Unscorable

logger = logging.getLogger(__name__)

_COMPARED = 64  # prompts of a batch
_CONTEXT = 12  # tokens before and after a difference


def check_name(name: str, trainer: Any) -> None:
    """
    Whether a reward's name is its own among the trainer's.

    Raises:
        ConfigError: another reward has it.
    """
    names = [getattr(function, "__name__", None) for function in _compat.reward_functions(trainer)]
    if names.count(name) > 1:
        raise ConfigError(
            f"{names.count(name)} of the trainer's rewards are called {name}: their metrics would mix. Pass another "
            "name=."
        )


def check_policy(name: str, policy: nn.Module | None, models: Iterable[nn.Module]) -> None:
    """
    Whether no model that scores is being trained: the policy as the trainer has it, or what its adapters were put into,
    which peft does in place.

    Args:
        name (`str`): The reward's.
        policy (`nn.Module`, *optional*): The trainer's.
        models (`Iterable`): Those of the pair that were passed as objects.

    Raises:
        ConfigError: one is: the policy would learn to please itself.
    """
    trained = set() if policy is None else {id(one) for one in policy.parameters() if one.requires_grad}
    if any(id(one) in trained for model in models for one in model.parameters()):
        raise ConfigError(
            f"the policy is one of the models that {name} scores with, or an adapter in it: the reward would change "
            "with every step. Pass the model's name, or a copy of it."
        )


def check_domains(router: Router | None, datasets: Mapping[str, Any]) -> None:
    """
    Whether data sets have the column that the router reads, and name domains in it. Rows without a domain are left to
    the row, and so is all that is not known before it is read (streams, data sets of another kind).

    Args:
        router (`Router`, *optional*): The scorer's.
        datasets (`Mapping[str, Any]`): By what an error calls them; each a data set, several by name, or None.

    Raises:
        InputError: the column is not there, or names a domain that the criteria do not know.
    """
    if router is None or router.column is None:
        return
    for where, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_domains(router, {f"{where}[{key!r}]": part for key, part in dataset.items()})
            continue
        columns = getattr(dataset, "column_names", None)
        if isinstance(columns, list):
            router.check_column(columns, _values(dataset, router.column), where=where)


def compare_prompts(name: str, scorer: DensityRatioScorer, trainer: Any, prompts: Sequence[Prompt]) -> None:
    """
    Compare the prompts that the pair scores after with the prompts that the policy wrote after, token by token. Log one
    warning if they differ. A model with another tokenizer than the policy's can't be compared.

    Args:
        name (`str`): The reward's.
        scorer (`DensityRatioScorer`): The reward's. Criteria, which the policy does not see, are left out.
        trainer (`Trainer`): The policy's.
        prompts (`Sequence`): Prompts of a batch; the first 64 are compared.
    """
    if not scorer.ranks.holds_pair or not prompts:
        return
    columns = getattr(getattr(trainer, "train_dataset", None), "column_names", None) or ()
    if _compat.is_online_dpo(trainer.args) and "chat_template_kwargs" in columns:
        return  # it renders each row with variables of its own
    # Environments are known for the batch as a whole.
    prompts = list(prompts) if _compat.has_environments(trainer) else list(prompts)[:_COMPARED]
    expected = _compat.policy_prompt_ids(trainer, prompts)
    tokenizer = _compat.inner_tokenizer(trainer.processing_class)
    if expected is None or len(expected) != len(prompts):
        return
    with scorer.use() as pair:
        vocabulary = vocabulary_hash(tokenizer)
        members = {"strong": pair.strong} if pair.reads_alike else {"strong": pair.strong, "weak": pair.weak}
        read = scorer.read_prompts(prompts, in_trainer=True)
        differences = []
        for role, member in members.items():
            if vocabulary_hash(member.encoder.tokenizer) != vocabulary:
                continue
            for prompt, policy_ids in zip(read, expected, strict=True):
                difference = _describe_difference(member.encoder, role, prompt, policy_ids)
                if difference is not None:
                    differences.append(difference)
                    break
    if differences:
        logger.warning(
            "%s scores completions after other prompts than the policy's. %s Set cdr_chat_template, "
            "cdr_chat_template_kwargs, cdr_date or cdr_add_special_tokens so that both are equal.",
            name,
            " ".join(differences),
        )


def _describe_difference(encoder: Encoder, role: str, prompt: Prompt, policy_ids: list[int]) -> str | None:
    """Where the tokens of a prompt differ from the policy's; `None` if they are equal, or the prompt has no tokens."""
    try:
        ids = encoder.prompt_ids(prompt)
    except Unscorable:
        return None
    if list(ids) == policy_ids:
        return None
    shared = 0
    while shared < min(len(ids), len(policy_ids)) and ids[shared] == policy_ids[shared]:
        shared += 1
    start = max(0, shared - _CONTEXT)
    theirs, own = (encoder.tokenizer.decode(part[start : shared + _CONTEXT]) for part in (policy_ids, list(ids)))
    return (
        f"From token {shared} on the policy reads {theirs!r} ({len(policy_ids)} tokens in all), and {role} reads "
        f"{own!r} ({len(ids)} tokens)."
    )


def trainer_datasets(trainer: Any) -> dict[str, Any]:
    """A trainer's data sets, by name; none without a trainer."""
    return {name: getattr(trainer, name, None) for name in ("train_dataset", "eval_dataset")}


def _values(dataset: Any, column: str) -> list[Any]:
    """The different values of a column of strings; of other kinds the first value says enough."""
    if not hasattr(dataset, "unique") or column not in dataset.column_names:
        return []
    only = dataset.select_columns([column])
    is_text = getattr(dataset.features[column], "dtype", None) in ("string", "large_string")
    return list(only.unique(column) if is_text else only[:1][column])
