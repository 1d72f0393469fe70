"""Pictures of a page by matplotlib: curves, and the distribution of rewards before and after."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dschat.report.panels import Panel
from dschat.report.records import Points, Records
from dschat.utils.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (4.8, 2.7)  # inches
BINS = 20


def curve(panel: Panel, records: Records) -> Figure:
    """Draw a panel: lines of training, points of held-out data."""
    figure, axes = _figure()
    for number, (name, *both) in enumerate(panel.lines(records)):
        train, held_out = ([(x, y) for x, y in p if y > 0 or not panel.log] for p in both)
        color, label = f"C{number}", _label(name)
        if train:
            axes.plot(*_columns(train), color=color, linewidth=1.4, label=label)
        if held_out:
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": ":"}
            axes.plot(*_columns(held_out), color=color, label=f"{label}, held out", **style)
    if panel.log and axes.get_lines():
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_lines():
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
    axes.legend(fontsize="small", frameon=False)
    return figure


def svg(figure: Figure) -> str:
    """Return the picture as an element of a page; its text stays text."""
    import matplotlib

    file = io.StringIO()
    # The salt makes names of parts the same each time; metadata would hold the date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dschat"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # the layout stays as it was found here
    return re.sub(r"^.*?(?=<svg )", "", file.getvalue(), flags=re.DOTALL)


def png(figure: Figure) -> bytes:
    """Return the picture as a PNG file."""
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


def _label(name: str) -> str:
    """The name without its group, printable; a dollar would begin a formula."""
    return printable(name.partition("/")[2] or name, keep="").replace("$", r"\$")


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
