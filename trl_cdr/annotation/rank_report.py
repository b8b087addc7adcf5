"""A ranking of pairs -> a table on the terminal, Markdown, a heat map and a scatter. `rank_pairs` counts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import markdown, print_table, say_what_was_run, share

_SHOWN = 10  # pairs on the terminal
_MOST_NUMBERS = 16  # models, beyond which the heat map's cells have no room for figures


def print_ranking(found: Mapping[str, Any], folder: Path) -> None:
    """
    Print the best pairs on stdout.

    Args:
        found (`Mapping`): What `rank_pairs` returns.
        folder (`Path`): Where its files are.
    """
    count = len(found["ranking"])
    title = f"{min(_SHOWN, count)} of {count} pairs: prefers the better completion, mean of domains (95 % interval)"
    print_table(title, _HEAD, _tabulate(found)[:_SHOWN], names=2)
    print()
    for line in _say(found):
        print(line)
    print(f"written to {folder}")


def write_markdown(found: Mapping[str, Any]) -> str:
    """What was found, as Markdown."""
    names = shorten_names(list(found["models"]))
    models = [
        [names[model], f"{each['performance']:.3f}", share(each["own"])] for model, each in found["models"].items()
    ]
    tables = [(_HEAD, _tabulate(found)), (["model", "performance", "own log-probability"], models)]
    lines = ["# Pairs", ""]
    for head, rows in tables:
        lines += [*markdown(head, rows), ""]
    return "\n".join([*lines, *(f"- {line}" for line in _say(found))]) + "\n"


def draw_ranking(found: Mapping[str, Any]) -> Figure:
    """
    The accuracy of every pair: a heat map of strong over weak, and beside the gap.

    Args:
        found (`Mapping`): What `rank_pairs` returns.
    """
    count = len(found["models"])
    side = max(3.6, 0.42 * count + 1.2)
    figure = Figure(figsize=(side + 6.2, max(4.0, side)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[side, 5])
    _draw_matrix(left, found)
    _draw_gaps(right, found)
    return figure


def shorten_names(names: Sequence[str]) -> dict[str, str]:
    """Models by the last part of their name, where that tells them apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] for name in names}
    return last if len(set(last.values())) == len(names) else {name: name for name in names}


def _draw_matrix(axes: Axes, found: Mapping[str, Any]) -> None:
    order = sorted(found["models"], key=lambda name: -found["models"][name]["performance"])
    names = shorten_names(order)
    accuracy = {(pair["strong"], pair["weak"]): pair["accuracy"][0] for pair in found["ranking"]}
    cells = [[accuracy.get((strong, weak), float("nan")) for weak in order] for strong in order]
    image = axes.imshow(cells, cmap="PuOr", vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, format=lambda height, _: f"{height:.0%}")
    axes.set_title("prefers the better completion, %", loc="left", fontsize=10)
    if len(order) <= _MOST_NUMBERS:
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                if row != column:
                    colour = "white" if abs(cell - 0.5) > 0.3 else "black"
                    axes.text(column, row, f"{100 * cell:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(order)), [names[name] for name in order], rotation=90, fontsize=8)
    axes.set_yticks(range(len(order)), [names[name] for name in order], fontsize=8)
    axes.set_xlabel("weak")
    axes.set_ylabel("strong (the most able first)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_gaps(axes: Axes, found: Mapping[str, Any]) -> None:
    upward = [pair for pair in found["ranking"] if pair["gap"] > 0]
    gaps = [pair["gap"] for pair in upward]
    means = [pair["accuracy"][0] for pair in upward]
    axes.vlines(
        gaps,
        [pair["accuracy"][1] for pair in upward],
        [pair["accuracy"][2] for pair in upward],
        color="#0072B2",
        alpha=0.25,
        linewidth=1.2,
    )
    axes.plot(gaps, means, "o", color="#0072B2", markersize=4.5)
    axes.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    said = "" if found["spearman"] is None else f", Spearman {found['spearman']:.2f}"
    axes.set_title(f"{len(upward)} pairs{said}", loc="left", fontsize=10)
    axes.set_xlabel(f"gap: strong less weak, {found['performance'].replace('as given', 'performance')}")
    axes.set_ylabel("prefers the better completion, 95 % interval")
    axes.set_ylim(min(0.4, *(pair["accuracy"][1] for pair in upward)) if upward else 0, 1.005)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda height, _: f"{height:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


_HEAD = ["strong", "weak", "gap", "accuracy"]


def _tabulate(found: Mapping[str, Any]) -> list[list[str]]:
    names = shorten_names(list(found["models"]))
    return [
        [names[pair["strong"]], names[pair["weak"]], f"{pair['gap']:+.3f}", share(pair["accuracy"])]
        for pair in found["ranking"]
    ]


def _say(found: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not hold, line by line."""
    names = shorten_names(list(found["models"]))
    upward = sum(pair["gap"] > 0 for pair in found["ranking"])
    said = "can't be told" if found["spearman"] is None else f"{found['spearman']:.2f}"
    yield f"Spearman of gap ({found['performance']}) and accuracy over {upward} pairs: {said}"
    for domain, place in found["best"].items():
        pair = found["ranking"][place]
        yield f"best for {domain}: {names[pair['strong']]} over {names[pair['weak']]}, {share(pair['domains'][domain])}"
    yield f"{found['pairs']} pairs of completions"
    yield from say_what_was_run(found)
