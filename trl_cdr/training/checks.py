"""What is checked when a reward and its trainer meet, before anything is scored: names, the policy, domains."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .. import _compat
from ..conditioning.router import Router
from ..errors import ConfigError


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
