"""A comparison as a picture: how the metric rose, and where it ended."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from typing import Any

from ..errors import InputError
from .comparison import Comparison, Entry, Spread

# Okabe and Ito's colours, which the colour-blind tell apart, and line styles for those who see none
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
FEW = 6  # with more curves than this, bands and marks hide one another, and only lines are drawn
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "headwise",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}


def plot(comparison: Comparison, file: str | Path) -> Path:
    """Writes an SVG: curves with bands from the least to the most over seeds, and dots of the end with the same bars.

    Raises: InputError without matplotlib, with how to install it.
    """

    def draw(figures: Any) -> Any:
        rows = len(comparison.entries)
        figure = figures.Figure(figsize=(9.0, max(3.4, 1.6 + 0.32 * rows)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _curves(left, comparison)
        _ends(right, comparison)
        return figure

    return _saved(draw, comparison, Path(file))


def plot_memory(comparison: Comparison, file: str | Path) -> Path:
    """Writes an SVG: the metric at the end against the bytes that all caches hold at the end of a text; one mechanism's are joined.

    Raises: InputError without matplotlib, with how to install it, or if fewer than two of them can decode.
    """
    known = [entry for entry in comparison.entries if entry.kv_bytes is not None]
    if len(known) < 2:
        raise InputError(f"{len(known)} of {len(comparison.entries)} mechanisms keep a cache; a picture needs two")

    def draw(figures: Any) -> Any:
        figure = figures.Figure(figsize=(6.5, 4.2), layout="constrained")
        _memory(figure.subplots(), comparison, known)
        return figure

    return _saved(draw, comparison, Path(file))


def _saved(draw: Any, comparison: Comparison, file: Path) -> Path:
    return saved(draw, _title(comparison), file)


def saved(draw: Any, title: str, file: Path) -> Path:
    """Writes what `draw` makes of matplotlib's figures as an SVG that is the same bytes every time.

    Raises: InputError without matplotlib, with how to install it.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError("pictures need matplotlib; install it with: pip install 'headwise[plots]'") from error
    with matplotlib.rc_context(STYLE):
        figure = draw(figures)
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=11)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": "headwise", "Title": title})
    return file


def _memory(axes: Any, comparison: Comparison, known: list[Entry]) -> None:
    groups: dict[str, list[Entry]] = {}
    for entry in known:
        groups.setdefault(_group(entry), []).append(entry)
    for number, (name, entries) in enumerate(groups.items()):
        points = [(float(entry.kv_bytes or 0) * comparison.sizes.context, entry) for entry in entries]
        points.sort(key=lambda point: point[0])
        look = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)], "linewidth": 1.4, "markersize": 5}
        axes.plot([at for at, _ in points], [entry.metric.mean for _, entry in points], label=_plain(name), **look)
        for at, entry in points:
            if len(entry.curves) > 1:
                axes.plot([at, at], [entry.metric.least, entry.metric.most], color=_colour(number), linewidth=1.0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"bytes of all caches after {comparison.sizes.context:,} tokens")
    axes.set_title(_plain(comparison.metric.replace("_", " ") + _seeds(comparison, False)))
    axes.axhline(comparison.chance, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    if comparison.ceiling is not None:
        axes.set_ylim(0, comparison.ceiling * 1.05)
    axes.legend(frameon=False, fontsize=8)


def _group(entry: Entry) -> str:
    """A mechanism's name; of a hybrid, the linear mixer's too: what differs between its points is a size or a ratio."""
    name, _, options = entry.mechanism.partition(":")
    linear = next((option for option in options.split(",") if option.startswith("linear=")), "")
    return f"{name}, {linear.removeprefix('linear=')}" if linear else name


def _curves(axes: Any, comparison: Comparison) -> None:
    for number, entry in enumerate(comparison.entries):
        steps = [step for step, _ in entry.curves[0]]
        values = list(zip(*([value for _, value in curve] for curve in entry.curves), strict=True))
        mean = [statistics.fmean(at) for at in values]
        look = {"color": _colour(number), "linestyle": STYLES[number // len(COLOURS) % len(STYLES)], "linewidth": 1.6}
        few = len(comparison.entries) <= FEW
        axes.plot(steps, mean, marker=MARKERS[number % len(MARKERS)] if few else None, markersize=3.5, **look)
        if len(entry.curves) > 1 and few:
            axes.fill_between(
                steps, [min(at) for at in values], [max(at) for at in values], color=_colour(number), alpha=0.15, lw=0
            )
    axes.set_xlabel("steps")
    axes.set_title(_plain(comparison.metric.replace("_", " ") + _seeds(comparison, len(comparison.entries) <= FEW)))
    axes.axhline(comparison.chance, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(
        "chance", (1, comparison.chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY, fontsize=8
    )
    if comparison.ceiling is not None:
        axes.set_ylim(0, comparison.ceiling * 1.03)
    axes.set_xlim(left=0)


def _ends(axes: Any, comparison: Comparison) -> None:
    """The legend, too: names stand beside dots of the curves' colours."""
    for number, entry in enumerate(comparison.entries):
        spread = entry.metric
        if len(entry.curves) > 1:
            axes.plot([spread.least, spread.most], [number, number], color=_colour(number), linewidth=1.6, solid_capstyle="butt")
        axes.plot([spread.mean], [number], marker=MARKERS[number % len(MARKERS)], markersize=7, color=_colour(number), linestyle="")
        axes.annotate(
            f"{spread.mean:.3g}", (spread.mean, number), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(comparison.entries)), [_plain(_name(entry)) for entry in comparison.entries])
    for number, label in enumerate(axes.get_yticklabels()):
        label.set_color(_colour(number))
    axes.set_ylim(len(comparison.entries) - 0.4, -0.6)
    if comparison.ceiling is not None:  # else ends lie close together, and far from chance
        axes.axvline(comparison.chance, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlim(0, comparison.ceiling * 1.05)
    axes.set_title(f"after {comparison.settings.steps:,} steps")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _title(comparison: Comparison) -> str:
    sizes, counts = comparison.sizes, {entry.parameters for entry in comparison.entries}
    same = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    layers = "1 layer" if sizes.layers == 1 else f"{sizes.layers} layers"
    return f"{comparison.problem['problem']}: {layers} of width {sizes.width}, {sizes.heads} heads, {same} parameters"


def _seeds(comparison: Comparison, banded: bool) -> str:
    count = len(comparison.seeds)
    return f": mean of {count} seeds{', band from the least to the most' * banded}" if count > 1 else ", one seed"


def _name(entry: Entry) -> str:
    return entry.mechanism if len(entry.mechanism) <= 32 else entry.mechanism[:31] + "…"


def _plain(text: str) -> str:
    """Text as it is, not as mathematics."""
    return text.replace("$", "\\$")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def about(spread: Spread, digits: int = 3) -> str:
    """A mean and its deviation, as in tables."""
    if spread.deviation is None:
        return f"{spread.mean:.{digits}f}"
    return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"
