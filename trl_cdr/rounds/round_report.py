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
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "rows", "reward", "pairs", "ties", "gated", "margin", "tokens", "loss"):
        table.add_column(heading, justify="right")
    for one in rounds:
        lengths = f"{one['chosen_tokens']:.1f} / {one['rejected_tokens']:.1f}"
        cells = [f"{one['rows']:,}", f"{one['reward']:+.2f}", f"{one['pairs']:,}", f"{one['ties']:,}"]
        cells += [f"{one['gated']:.1%}", f"{one['margin']:+.2f}", lengths]
        table.add_row(str(one["round"]), *cells, "-" if one["loss"] is None else f"{one['loss']:.3f}")
    Console().print(table, markup=False)
    print("reward: mean of all completions, by the policy that the round found; margin: mean of the pairs; nats")
    print("tokens: means of chosen / rejected; loss: mean of the round's training")
    print(f"policy  {policy}")
