"""What came of an annotation: counts by domain -> a summary, and its table on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..scoring.string_prompts import MEANINGS, describe_strings
from .shards import Counts, add_counts

_SKIPPED = {
    "tie": "ties",
    "min_margin": "too close",
    "missing": "without two scores",
    "truncated": "without two that were not cut off",
}


def summarise(counts: Counts) -> dict[str, Any]:
    """
    What `summary.json` says of a finished data set.

    Args:
        counts (`Counts`): What `groups.label_group` counted.

    Returns:
        `dict`: `rows`, `completions`, `pairs`, `skipped` (why a pair was left out -> how many), `unscorable` and
        `cut_off` (completions); `gated` (their share); `reward` (mean of those that have one, nats); `margin` (mean,
        nats), `chosen_tokens`, `rejected_tokens` (means), `longer_chosen` (share of pairs, equal lengths count half);
        under `domains` the same for each; and `string_prompts` (how prompts that are strings were read -> rows).
    """
    whole: Counts = {}
    for one in counts.values():
        add_counts(whole, {"": one})
    domains = {domain: _describe(counts[domain]) for domain in sorted(counts) if domain}
    counted = whole.get("", {})
    strings = {name: int(counted[f"strings_{name}"]) for name in MEANINGS if f"strings_{name}" in counted}
    return {**_describe(counted), "domains": domains, "string_prompts": strings}


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print a summary as a table with a row for each domain."""
    table = Table("", "rows", "pairs", "ties", "gated", "margin", "tokens", "longer")
    for name, one in {**summary["domains"], "all": summary}.items():
        lengths = f"{_number(one['chosen_tokens'], '.1f')} / {_number(one['rejected_tokens'], '.1f')}"
        cells = [f"{one['rows']:,}", f"{one['pairs']:,}", f"{one['skipped']['tie']:,}"]
        cells += [_number(one["gated"], ".1%"), _number(one["margin"], "+.2f"), lengths]
        table.add_row(name, *cells, _number(one["longer_chosen"], ".0%"))
    Console().print(table, markup=False)
    print("margin: mean, nats; tokens: means of chosen / rejected; longer: how often the chosen is")
    skipped = (f"{count:,} {_SKIPPED[why]}" for why, count in summary["skipped"].items())
    print(f"no pair: {', '.join(skipped)}")
    for line in describe_strings(summary["string_prompts"]):
        print(line)
    bad = summary["bad_rows"]
    for row in bad["first"][:5]:
        print(f"left out: {row['where']} {row['reason']}")
    if bad["count"] > 5:
        print(f"left out: {bad['count']} rows in all; summary.json names the first {len(bad['first'])}")
    print(f"written to  {folder}")


def _describe(counts: Mapping[str, float]) -> dict[str, Any]:
    pairs, completions = counts.get("pairs", 0), counts.get("completions", 0)
    scored = completions - counts.get("unscorable", 0)
    return {
        **{name: int(counts.get(name, 0)) for name in ("rows", "completions", "pairs", "unscorable", "cut_off")},
        "skipped": {name: int(counts.get(name, 0)) for name in _SKIPPED},
        "gated": counts["gated"] / completions if completions else None,
        "reward": counts["reward"] / scored if scored else None,
        **{
            name: counts[name] / pairs if pairs else None
            for name in ("margin", "chosen_tokens", "rejected_tokens", "longer_chosen")
        },
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
