"""The demos' figures. Draws what `story`, `customize` and `real` measured, and measures nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, list[float]]]

_LINES = {  # name: label, colour (Okabe and Ito's palette, told apart by all kinds of colour vision), width
    "gold": ("gold as reward (upper bound)", "#D55E00", 1.8),
    "cdr": ("CDR: mild over base", "#0072B2", 3.0),
    "random": ("random reward (control)", "#666666", 1.8),
}


def draw_gold(curves: Curves, path: Path) -> None:
    """Write the figure as PNG.

    Args:
        curves (`Curves`): For each of `cdr`, `gold` and `random` the lists `steps` and `gold` of equal length.
        path (`Path`): The file to write.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last = max(curves["cdr"]["steps"])
    for name, (_, colour, width) in _LINES.items():
        axes.plot(curves[name]["steps"], curves[name]["gold"], color=colour, linewidth=width, solid_capstyle="round")
    heights = _spread({name: curves[name]["gold"][-1] for name in _LINES}, gap=0.06)
    for name, (label, colour, _) in _LINES.items():
        text = f"{label}  {curves[name]['gold'][-1]:.2f}"
        axes.annotate(text, (last, heights[name]), (8, 0), textcoords="offset points", color=colour, va="center")
    start, end = curves["cdr"]["gold"][0], curves["cdr"]["gold"][-1]
    axes.set_title(
        f"Online DPO on CDR labels takes the gold reward from {start:.2f} to {end:.2f}", loc="left", fontsize=13, pad=12
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("gold reward on held-out prompts")
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    figure.savefig(path)


def draw_labels(labels: Mapping[str, Mapping[str, Any]], judges: Mapping[str, str], path: Path) -> None:
    """Write the figure of the real pair's labels as PNG.

    Args:
        labels (`Mapping`): For `seen` and `unseen` kinds of condition what `real_labels.measure_labels` returns.
        judges (`Mapping[str, str]`): The judges to show, from top to bottom, with their labels.
        path (`Path`): The file to write.
    """
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, (kinds, found) in zip(panels, labels.items(), strict=True):
        for place, judge in enumerate(judges):
            for part, offset, alpha in (("drawn", -0.19, 1.0), ("matched", 0.19, 0.55)):
                if found[part][judge] is None:  # no such pair
                    continue
                mean, low, high = found[part][judge]
                colour = {"ratio": "#0072B2", "reward": "#56B4E9"}.get(judge, "#8a959d")
                axes.barh(place + offset, mean, height=0.34, color=colour, alpha=alpha)
                axes.plot([low, high], [place + offset] * 2, color="#222222", linewidth=1.1)
                axes.annotate(
                    f"{mean:.2f}", (high, place + offset), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.axvline(0.5, color="#444444", linewidth=0.8, linestyle=":")
        drawn, matched = found["drawn"]["pairs"], found["matched"]["pairs"]
        axes.set_title(f"{kinds} kinds: {drawn} pairs (pale: {matched} of like length)", loc="left", fontsize=10)
        axes.set_xlim(0, 1.05)
        axes.set_xlabel("prefers the right completion, 95 % interval")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(judges)), list(judges.values()))
    panels[0].invert_yaxis()
    figure.savefig(path)


_REWARDS = {  # as `real.REWARDS`: label, colour
    "gold": ("gold itself", "#D55E00"),
    "surprise": ("the pair, gate surprise", "#0072B2"),
    "typicality": ("the pair, gate typicality", "#009E73"),
    "none": ("the pair, no gate", "#56B4E9"),
    "random": ("random", "#666666"),
}
_QUANTITIES = {"gold": "gold reward", "tokens": "tokens", "repeats": "share that repeats itself"}


def draw_training(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Sequence[float]]]]], path: Path) -> None:
    """Write the figure of the real policies' training as PNG: what they wrote, step by step.

    Args:
        runs (`Mapping`): By loop, then by reward, a curve for each seed: lists by step of `gold`, `tokens`, `repeats`.
        path (`Path`): The file to write.
    """
    figure = Figure(figsize=(10, 2.9 * len(runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), len(_QUANTITIES), squeeze=False)
    for row, (loop, by_reward) in zip(panels, runs.items(), strict=True):
        for axes, (quantity, label) in zip(row, _QUANTITIES.items(), strict=True):
            for reward, curves in by_reward.items():
                name, colour = _REWARDS[reward]
                lines = [_smooth(curve[quantity]) for curve in curves]
                for line in lines:
                    axes.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.8, alpha=0.45)
                mean = [sum(values) / len(values) for values in zip(*lines, strict=True)]
                axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.2, label=name)
            axes.set_title(f"{loop}: {label}", loc="left", fontsize=10)
            axes.set_ylim(0, 1 if quantity != "tokens" else None)
            axes.set_xlabel("training step")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    panels[0][-1].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Means over the last so many values: a step has few completions."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _spread(heights: Mapping[str, float], *, gap: float) -> dict[str, float]:
    """Move labels up until neighbours are at least `gap` apart, the lowest one staying where its line ends."""
    spread: dict[str, float] = {}
    floor = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        spread[name] = floor = max(height, floor + gap)
    return spread


def draw_customize(
    accuracy: Mapping[str, float],
    kinds: Mapping[str, str],
    curves: Mapping[str, Sequence[Mapping[str, list[float]]]],
    path: Path,
) -> None:
    """Write the figure of the demo of criteria as PNG.

    Args:
        accuracy (`Mapping[str, float]`): Share of pairs by conditioning.
        kinds (`Mapping[str, str]`): The conditionings to show, from top to bottom, with their labels.
        curves: For `plain` and `conditioned` the curves of each seed: lists `steps` and `gold` of equal length.
        path (`Path`): The file to write.
    """
    figure = Figure(figsize=(10, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for place, (kind, label) in enumerate(kinds.items()):
        colour = "#0072B2" if kind.startswith("own") else "#9aa5ad"
        left.barh(place, accuracy[kind], color=colour, height=0.62)
        left.annotate(f"{accuracy[kind]:.2f}", (accuracy[kind], place), (4, 0), textcoords="offset points", va="center")
        left.annotate(label, (0, place), (-6, 0), textcoords="offset points", va="center", ha="right")
    left.axvline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    left.set_title("Pairs labelled right", loc="left", fontsize=12)
    left.set_yticks([])
    left.invert_yaxis()
    left.set_xlim(0, 1.05)
    left.set_xlabel("share of pairs (chance 0.5)")
    for name, colour in (("conditioned", "#0072B2"), ("plain", "#9aa5ad")):
        for curve in curves[name]:
            right.plot(curve["steps"], curve["gold"], color=colour, linewidth=2, solid_capstyle="round")
    last = max(curves["plain"][0]["steps"])
    ends = {name: max(curve["gold"][-1] for curve in curves[name]) for name in curves}
    for name, height in _spread(ends, gap=0.07).items():
        colour = "#0072B2" if name == "conditioned" else "#6b767e"
        right.annotate(name, (last, height), (6, 0), textcoords="offset points", color=colour, va="center")
    right.set_title("Online DPO on each reward, two seeds", loc="left", fontsize=12)
    right.set_xlabel("training step")
    right.set_ylabel("gold reward on held-out prompts")
    right.set_xlim(0, last)
    right.set_ylim(0, 1)
    right.grid(axis="y", color="#dddddd", linewidth=0.8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
