"""What came of the rounds: summaries of pairs and of training -> one row a round, and their table on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_OF_PAIRS = ("rows", "pairs", "reward", "gated", "margin", "chosen_tokens", "rejected_tokens", "longer_chosen")


def describe_round(
    number: int, pairs: Mapping[str, Any], log: Mapping[str, Any], *, held_out: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    A round in `summary.json`.

    Args:
        number (`int`): From 1.
        pairs (`Mapping`): `annotate`'s summary of its pairs.
        log (`Mapping`): What `read_log` found.
        held_out (`Mapping`, *optional*): `annotate`'s summary of the pairs of `eval_split`.

    Returns:
        `dict`: `round`; `rows`, `pairs`, `ties` (prompts without a choice), `reward` (mean of all completions, by the
        policy that the round found), `gated`, `margin`, `chosen_tokens`, `rejected_tokens`, `longer_chosen` as in
        `annotate`'s; `eval_reward`, the same of prompts that are held out; and of the training `read_log`'s.
    """
    ours = {"round": number, **{name: pairs[name] for name in _OF_PAIRS}, "ties": pairs["skipped"]["tie"]}
    return {**ours, "eval_reward": None if held_out is None else held_out["reward"], **log}


def show_rounds(rounds: Sequence[Mapping[str, Any]], policy: Path) -> None:
    """
    Print the table that closes a run.

    Args:
        rounds (`Sequence[Mapping]`): What `describe_round` says of each.
        policy (`Path`): Where the last policy is.
    """
    table = Table(box=None, pad_edge=False)
    is_evaluated = any(one["eval_reward"] is not None for one in rounds)
    headings = ["round", "rows", "reward", "pairs", "ties", "gated", "margin", "tokens", "loss"]
    for heading in [*headings, *(["held out"] if is_evaluated else [])]:
        table.add_column(heading, justify="right")
    for one in rounds:
        lengths = f"{one['chosen_tokens']:.1f} / {one['rejected_tokens']:.1f}"
        cells = [f"{one['rows']:,}", f"{one['reward']:+.2f}", f"{one['pairs']:,}", f"{one['ties']:,}"]
        cells += [f"{one['gated']:.1%}", f"{one['margin']:+.2f}", lengths]
        cells.append("-" if one["loss"] is None else f"{one['loss']:.3f}")
        if is_evaluated:
            cells.append(f"{one['eval_reward']:+.2f}")
        table.add_row(str(one["round"]), *cells)
    Console().print(table, markup=False)
    print("reward: mean of all completions, by the policy that the round found; margin: mean of the pairs; nats")
    print("tokens: means of chosen / rejected; loss: mean of the round's training")
    if is_evaluated:
        print("held out: reward of completions to the prompts of eval_split, by the same policy")
    print(f"policy  {policy}")
