"""The demo's figure: gold reward against step, one line a reward. Draws what `story` measured and measures nothing."""

from collections.abc import Mapping
from pathlib import Path

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


def _spread(heights: Mapping[str, float], *, gap: float) -> dict[str, float]:
    """Move labels up until neighbours are at least `gap` apart, the lowest one staying where its line ends."""
    spread: dict[str, float] = {}
    floor = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        spread[name] = floor = max(height, floor + gap)
    return spread
