"""What a probe found -> a table on the terminal and a figure. Measures nothing; `probe` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..scoring.string_prompts import describe_strings
from .attacks import ATTACKS
from .probe import GATES, SEARCHES

ATTACK_NAMES = ATTACKS | SEARCHES
"""Attacks by name, in words."""
_GATE_NAMES = {"none": "plain ratio", "typicality": "typicality", "surprise": "surprise"}
# Okabe and Ito's palette, told apart by all kinds of colour vision; markers for those who see none.
_LOOKS = {"none": ("#888888", "o"), "typicality": ("#0072B2", "s"), "surprise": ("#D55E00", "D")}
_WIDTH = 110  # columns; with fewer, intervals are left to the file


def print_probe(found: Mapping[str, Any], folder: Path) -> None:
    """
    Print the table on stdout.

    Args:
        found (`Mapping`): What `probe` returns.
        folder (`Path`): Where its files are.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    gates = _gates(found)
    is_wide = console.width >= _WIDTH
    title = f"worth more than an honest completion: share of {found['prompts']} prompts"
    title += " (95 % interval)" if is_wide else ""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("attack", min_width=16)
    for gate in gates:
        table.add_column(_head(found, gate).replace(" ", "\n", 1), justify="right", no_wrap=True)
        if gate != "none":
            table.add_column("stopped", justify="right", no_wrap=True)
    for name, one in found["attacks"].items():
        cells = [cell for gate in gates for cell in _cells(one[gate], gate, is_wide=is_wide)]
        table.add_row(ATTACK_NAMES[name], *cells)
    console.print(table)
    honest, win = found["honest"], found["win"]
    console.print(
        f"\nbehind {_GATE_NAMES[found['gate']]}: {win['mean']:.0%} on average over the attacks, "
        f"{win['worst']:.0%} at worst ({ATTACK_NAMES[win['attack']]})"
    )
    for gate in gates:
        one = honest[gate]
        ties = "-" if one["ties"] is None else f"{one['ties']:.0%}"
        length = "-" if one["length_correlation"] is None else f"{one['length_correlation']:+.2f}"
        console.print(
            f"{honest['completions']} honest completions, {_GATE_NAMES[gate]}: {one['gated']:.0%} stopped, "
            f"ties {ties}, correlation with length {length}"
        )
    for line in describe_strings(found["string_prompts"]):
        console.print(line)
    for reason, count in found["left_out"].items():
        console.print(f"left out ({count}): {reason}")
    console.print(f"written to {folder / 'probe.json'} and probe.png", soft_wrap=True)


def draw_probe(found: Mapping[str, Any], path: Path, *, max_win: float | None = None) -> None:
    """
    Write the figure as PNG.

    Args:
        found (`Mapping`): What `probe` returns.
        path (`Path`): The file to write.
        max_win (`float`, *optional*): Drawn as a line.
    """
    gates, names = _gates(found), list(found["attacks"])
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, gate in enumerate(gates):
        colour, marker = _LOOKS[gate]
        shift = 0.24 * (index - (len(gates) - 1) / 2)
        rates = [found["attacks"][name][gate]["win"] for name in names]
        heights = [place + shift for place in range(len(names))]
        axes.hlines(heights, [low for _, low, _ in rates], [high for _, _, high in rates], color=colour, linewidth=1.4)
        axes.plot(
            [mean for mean, _, _ in rates],
            heights,
            marker,
            color=colour,
            markersize=5.5,
            label=_head(found, gate),
            clip_on=False,
            zorder=3,
        )
    if max_win is not None:
        axes.axvline(max_win, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), [ATTACK_NAMES[name] for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"worth more than an honest completion: share of {found['prompts']} prompts, 95 % interval")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=10)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=len(gates), frameon=False)
    figure.savefig(path)


def _gates(found: Mapping[str, Any]) -> list[str]:
    return [gate for gate in GATES if gate in found["honest"]]


def _head(found: Mapping[str, Any], gate: str) -> str:
    return _GATE_NAMES[gate] + (" (the reward)" if gate == found["gate"] else "")


def _cells(one: Mapping[str, Any], gate: str, *, is_wide: bool) -> list[str]:
    mean, low, high = one["win"]
    cells = [f"{mean:.0%}" + (f" ({low:.0%}-{high:.0%})" if is_wide else "")]
    return cells if gate == "none" else [*cells, f"{one['gated']:.0%}"]
