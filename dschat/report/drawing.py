"""Pictures of a page by matplotlib: curves, and the distribution of rewards before and after."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dschat.functional.proportions import ReliabilityBin, wilson_interval
from dschat.report.panels import Panel, finite
from dschat.report.records import Points, Records
from dschat.utils.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (4.8, 2.7)  # inches
BINS = 20
MOST_INSIDE = 5  # lines that a legend among the curves may name


def curve(panel: Panel, records: Records) -> Figure:
    """Draw a panel: lines of training, points of held-out data."""
    figure, axes = _figure()
    for number, (name, *both) in enumerate(panel.lines(records)):
        train, held_out = ([(x, y) for x, y in p if not (panel.log and y <= 0)] for p in both)
        color, label = f"C{number}", _label(name)
        if finite(train):
            alone = "s" if finite(train) == 1 else None  # a line of one point shows nothing
            axes.plot(*_columns(train), color=color, linewidth=1.4, marker=alone, label=label)
        if held_out:
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": ":"}
            axes.plot(*_columns(held_out), color=color, label=f"{label}, held out", **style)
    if panel.log and axes.get_lines():
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(axes.get_lines()) > MOST_INSIDE:
        figure.set_figheight(SIZE[1] + 0.2 * len(axes.get_lines()))
        figure.legend(loc="outside lower left", fontsize="small", frameon=False)
    elif axes.get_lines():
        axes.legend(fontsize="small", frameon=False)
    return figure


def distributions(before: Sequence[float], after: Sequence[float]) -> Figure:
    """Draw the rewards of the same held-out prompts at the first and at the last evaluation."""
    figure, axes = _figure()
    low, high = min(*before, *after), max(*before, *after)
    bins = [low + (high - low) * i / BINS for i in range(BINS + 1)] if high > low else BINS
    for values, label in ((before, "before"), (after, "after")):
        axes.hist(values, bins, alpha=0.6, label=label)
    axes.set(xlabel="reward", ylabel="answers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(loc="upper right", ncols=2, fontsize="small", frameon=False)
    return figure


def reliability(bins: Sequence[ReliabilityBin], figures: Mapping[str, float]) -> Figure:
    """Draw how often a reward model is right, by how sure it is, and the bins' sizes below.

    Args:
        bins: with Wilson's intervals. figures: accuracy, `ece` and number of pairs.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(SIZE[0], 1.5 * SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    confidence, accuracy = [b.confidence for b in bins], [b.accuracy for b in bins]
    bounds = [wilson_interval(b.accuracy * b.count, b.count) for b in bins]
    errors = [
        [max(b.accuracy - low, 0.0) for b, (low, _) in zip(bins, bounds, strict=True)],
        [max(high - b.accuracy, 0.0) for b, (_, high) in zip(bins, bounds, strict=True)],
    ]
    upper.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="calibrated")
    upper.errorbar(confidence, accuracy, errors, marker="o", capsize=2, label="model")
    upper.set(xlim=(0.5, 1), ylim=(0, 1), ylabel="accuracy")
    upper.legend(loc="lower right", fontsize="small", frameon=False)
    accuracy_and_ece = f"accuracy {figures['accuracy']:.3f}, ECE {figures['ece']:.3f}"
    upper.set_title(f"{figures['pairs']:.0f} pairs, {accuracy_and_ece}", fontsize="medium")
    widths = [b.high - b.low for b in bins]
    lower.bar([b.low for b in bins], [b.count for b in bins], widths, align="edge", edgecolor="w")
    lower.set(xlabel="confidence, sigmoid(|margin|)", ylabel="pairs")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Figure) -> str:
    """Return the picture as an element of a page; its text stays text."""
    import matplotlib

    _fix_layout(figure)
    file = io.StringIO()
    # The salt makes names of parts the same each time; metadata would hold the date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dschat"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg )", "", file.getvalue(), flags=re.DOTALL)


def png(figure: Figure) -> bytes:
    """Return the picture as a PNG file."""
    _fix_layout(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _fix_layout(figure: Figure) -> None:
    """Find room for all labels, once: with an engine left each picture is drawn twice."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis by 0.001 and 1e-05: powers as formulas cost a quarter of a page."""
    from matplotlib.ticker import LogFormatter

    plain = LogFormatter(minor_thresholds=(1, 0.5))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)


def _label(name: str) -> str:
    """The name without its group, printable; a dollar would begin a formula."""
    return printable(name.partition("/")[2] or name, keep="").replace("$", r"\$")


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
