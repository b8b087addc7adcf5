"""What came of the rounds: summaries of pairs and of training -> one row a round, and their table on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_OF_PAIRS = ("rows", "pairs", "reward", "gated", "margin", "chosen_tokens", "rejected_tokens", "longer_chosen")


def describe_round(number: int, pairs: Mapping[str, Any], log: Mapping[str, Any]) -> dict[str, Any]:
    """
    A round in `summary.json`.

    Args:
        number (`int`): From 1.
        pairs (`Mapping`): `annotate`'s summary of its pairs.
        log (`Mapping`): What `read_log` found.

    Returns:
        `dict`: `round`; `rows`, `pairs`, `ties` (prompts without a choice), `reward` (mean of all completions, by the
        policy that the round found), `gated`, `margin`, `chosen_tokens`, `rejected_tokens`, `longer_chosen` as in
        `annotate`'s; `steps`, `loss`, `accuracy` of the training.
    """
    return {"round": number, **{name: pairs[name] for name in _OF_PAIRS}, "ties": pairs["skipped"]["tie"], **log}


def show_rounds(rounds: Sequence[Mapping[str, Any]], policy: Path) -> None:
    """
    Print the table that closes a run.

    Args:
        rounds (`Sequence[Mapping]`): What `describe_round` says of each.
        policy (`Path`): Where the last policy is.
    """
    table = Table("round", "rows", "reward", "pairs", "ties", "gated", "margin", "tokens", "longer", "loss", "prefers")
    for one in rounds:
        lengths = f"{one['chosen_tokens']:.1f} / {one['rejected_tokens']:.1f}"
        cells = [f"{one['rows']:,}", f"{one['reward']:+.2f}", f"{one['pairs']:,}", f"{one['ties']:,}"]
        cells += [f"{one['gated']:.1%}", f"{one['margin']:+.2f}", lengths, f"{one['longer_chosen']:.0%}"]
        table.add_row(str(one["round"]), *cells, _number(one["loss"], ".3f"), _number(one["accuracy"], ".0%"))
    Console().print(table, markup=False)
    print(
        "reward: mean of all completions, by the policy that the round found, nats; margin: mean of the pairs', nats; "
        "tokens: means of chosen / rejected; longer: how often the chosen is; loss: mean of the round; prefers: how "
        "often the policy prefers the chosen, in the last log"
    )
    print(f"policy  {policy}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
