"""The summary of the LoRA+ grid as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _number(value: float | None, form: str = ".4f") -> str:
    return "diverged" if value is None else format(value, form)


def _rate(value: float) -> str:
    return f"{value:.2e} (2^{round(math.log2(value))})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(everything: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    full = everything["full"]
    rows = [[_rate(row["eta"]), _number(row["loss"])] for row in full["rates"]]
    parts = [f"## {everything['shared']['task']}", "All weights", _table(["eta", "loss"], rows)]
    for init, summary in everything["init"].items():
        parts += [f"### init {init}", *_render_init(summary)]
    return "\n\n".join(parts)


def _render_init(summary: Mapping[str, Any]) -> list[str]:
    cells = f"{summary['cells']} cells, {summary['diverged']} diverged"
    if summary["ratio_on_edge"]:
        cells += "; the best lambda is the outermost that was tried"
    head = ["lambda", "cells", "best eta_A", "eta_A / eta_full", "loss", "basin, factors of 2"]
    rows = [
        [
            f"{row['ratio']:g}",
            str(row["cells"]),
            _rate(row["eta_A"]) + _edge(row),
            "-" if row["over_full"] is None else f"{row['over_full']:g}",
            _number(row["loss"]),
            ("≥ " if row["basin_open"] else "") + f"{row['basin']:.1f}",
        ]
        for row in summary["per_ratio"]
    ]
    alphas = [
        [
            f"{row['ratio']:g}",
            f"{row['alpha']:g} r",
            str(row["cells"]),
            "-" if row["loss"] is None else _rate(row["eta_A"]) + _edge(row),
            _number(row["loss"]),
        ]
        for row in summary["alpha"]
    ]
    return [
        cells,
        _table(head, rows),
        *_render_winners(summary["winners"]),
        _table(["lambda", "alpha", "cells", "best eta_A", "loss"], alphas),
    ]


def _edge(row: Mapping[str, Any]) -> str:
    return " (at the edge)" if row["on_edge"] else ""


def _spread(row: Mapping[str, Any]) -> str:
    deviation = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
    return _number(row["mean"]) + deviation


def _render_winners(winners: Mapping[str, Any]) -> list[str]:
    """The winners on fresh seeds; for those beyond lambda 1, the steps to its final loss."""
    rows = [
        [
            name,
            f"{row['ratio']:g}",
            _rate(row["eta_A"]),
            _number(row["loss"]),
            f"{_spread(row['fresh'])} ({row['fresh']['seeds']})",
            "-" if row["against"] is None else _spread(row["against"]["gain"]),
        ]
        for name, row in winners.items()
    ]
    head = ["best of lambda", "lambda", "eta_A", "loss, grid seeds", "fresh seeds", "gain by seed"]
    against = {name: row["against"] for name, row in winners.items() if row["against"]}
    saved = [
        [
            name,
            _number(row["target"]),
            _steps(row["steps_on_curve"], row["budget"]),
            _steps(row["steps_of_schedule"], row["budget"]),
            ", ".join(f"{steps}: {_number(loss)}" for steps, loss in row["schedules"]),
        ]
        for name, row in against.items()
    ]
    reach = ["best of lambda", "lambda 1's final loss", "reached on its curve at step"]
    reach += ["reached by a schedule of", "full schedules, steps: loss"]
    return [_table(head, rows), _table(reach, saved)]


def _steps(steps: float | None, budget: int) -> str:
    if steps is None:
        return f"not within {budget}"
    return f"{steps:.0f} of {budget} ({100 * steps / budget:.0f} %)"
