"""What an evaluation found -> a table on the terminal, Markdown, and a figure. Counts nothing; `evaluate` does."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .judges import JUDGES
from .report import difference, markdown, print_table, say_what_was_run, share
from .tables import CRITERIA

# Okabe and Ito's palette, told apart by all kinds of colour vision; markers for those who see none.
_OURS, _CRITERIA, _OTHER = "#0072B2", "#D55E00", "#888888"


def print_evaluation(found: Mapping[str, Any], folder: Path) -> None:
    """
    Print what was found on stdout.

    Args:
        found (`Mapping`): A summary that `evaluate` made.
        folder (`Path`): Where its files are.
    """
    if "judges" in found:
        title = f"prefers the better completion: {found['pairs']} pairs, mean of domains (95 % interval)"
        print_table(title, *_tabulate(found))
        print()
    for line in _say(found):
        print(line)
    print(f"written to {folder}")


def write_markdown(found: Mapping[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["# Evaluation", ""]
    if "judges" in found:
        head, rows = _tabulate(found)
        lines += [
            *markdown(head, rows),
            "",
            "Mean of domains, each the mean of its subsets; 95 % intervals by prompt.",
            "",
        ]
        lines += [*markdown(*_tabulate_subsets(found)), ""]
    lines += [f"- {line}" for line in _say(found)]
    return "\n".join(lines) + "\n"


def draw_evaluation(found: Mapping[str, Any]) -> Figure:
    """
    The judges by domain.

    Args:
        found (`Mapping`): A summary that `evaluate` made, of labelled pairs.
    """
    judges = [(reading, name, each) for reading, by_judge in found["judges"].items() for name, each in by_judge.items()]
    domains = list(judges[0][2]["domains"])
    panels = ["mean of domains", *(domains if len(domains) > 1 else [])]
    figure = Figure(figsize=(2.6 + 1.75 * len(panels), 1.3 + 0.32 * len(judges)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        for place, (reading, name, each) in enumerate(judges):
            mean, low, high = each["mean"] if panel == panels[0] else each["domains"][panel]
            colour = _OTHER if name not in ("sum", "mean", "reward") else _CRITERIA if reading == CRITERIA else _OURS
            axes.hlines(place, low, high, color=colour, linewidth=1.6)
            axes.plot(mean, place, "o", color=colour, markersize=5.5, zorder=3)
            if panel == panels[0] and "calibrated" in each:
                axes.plot(each["calibrated"][0], place + 0.25, "d", color=colour, markersize=4, zorder=3)
        axes.axvline(0.5, color="#444444", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda place, _: f"{place:.0%}")
        axes.set_xticks([0, 0.5, 1])
        axes.set_title(panel.replace("_", " "), loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        if panel == panels[0]:
            axes.set_yticks(range(len(judges)), [_name(reading, name) for reading, name, _ in judges])
            axes.set_ylim(len(judges) - 0.45, -0.55)
    figure.supxlabel(
        f"prefers the better completion: share of {found['pairs']} pairs, 95 % interval; diamond: length taken out",
        fontsize=9,
    )
    return figure


def _tabulate(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Judges by domain: the head, and rows of cells."""
    first = next(iter(next(iter(found["judges"].values())).values()))
    head = ["judge", *first["domains"], "mean", "without length"]
    rows = [
        [
            _name(reading, name),
            *(f"{mean:.3f}" for mean, _, _ in each["domains"].values()),
            share(each["mean"]),
            f"{each['calibrated'][0]:.3f}" if "calibrated" in each else "",
        ]
        for reading, by_judge in found["judges"].items()
        for name, each in by_judge.items()
    ]
    return head, rows


def _tabulate_subsets(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Subsets by judge, of the reading that the pair labels by."""
    reading, main = found["main"]
    shown = [main, *(name for name in ("strong_sum", "longer") if name in found["judges"][reading])]
    head = ["subset", "domain", "pairs", "prompts", *(_name(reading, name) for name in shown)]
    rows = [
        [name, each["domain"], str(each["pairs"]), str(each["prompts"])]
        + [share(found["judges"][reading][judge]["subsets"][name]) for judge in shown]
        for name, each in found["subsets"].items()
    ]
    return head, rows


def _say(found: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not hold, line by line."""
    if "judges" in found:
        reading, main = found["main"]
        leads = ", ".join(f"{JUDGES[name]} {difference(lead)}" for name, lead in found["lead"].items())
        yield f"{_name(reading, main)} is ahead of: {leads}"
        if found["criteria_lead"] is not None:
            yield f"criteria add {difference(found['criteria_lead'])}"
        for benchmark, scores in found["judges"][reading][main]["benchmarks"].items():
            sections = ", ".join(f"{name} {score:.1%}" for name, score in scores.items() if name != "score")
            yield f"{benchmark}: {scores['score']:.1%} ({sections})"
    if "baseline" in found:
        one = found["baseline"]
        yield (
            f"baseline, on {one['rows']} rows of both: {share(one['ours'])} here, {share(one['theirs'])} there, lead "
            f"{difference(one['lead'])}; {one['won']} rows won, {one['lost']} lost, {one['missing']} missing there"
        )
    if "labels" in found:
        one = found["labels"]
        shares = ", ".join(f"{name} {share(interval)}" for name, interval in one["candidates"].items())
        unknown = f" ({one['unknown']} more name no pair)" if one["unknown"] else ""
        yield f"{one['labels']} labels{unknown} choose: {one['best']}"
        yield f"agrees with labels, on pairs over which candidates differ: {shares}"
        if one["lead"] is not None:
            yield f"the first is ahead of the second by {difference(one['lead'])}"
    yield from say_what_was_run(found)


def _name(reading: str, judge: str) -> str:
    return JUDGES[judge] + (", with criteria" if reading == CRITERIA and judge != "longer" else "")
