"""Reliability plot of a reward model: how often it is right, by how sure it is."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.functional.proportions import wilson_interval
from dschat.models.reward_statistics import EVALUATION_FILE
from dschat.train.pair_report import PairReport

PLOT_FILE = str(Path(EVALUATION_FILE).with_suffix(".png"))


def report_files(report: PairReport, settings: Mapping[str, Any], rank: int) -> dict[str, bytes]:
    """Make the files of a report by name: JSON, and a plot.

    Args:
        settings: flags that repeat the evaluation. rank: other ranks than 0 have no files.
    """
    if rank != 0:
        return {}
    text = report.text(settings).encode()
    return {EVALUATION_FILE: text, PLOT_FILE: reliability_png(report)}


def reliability_png(report: PairReport) -> bytes:
    """Draw accuracy over confidence by bin, with Wilson's intervals, and the bins' sizes below."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    bins, figure = report.reliability, Figure(figsize=(4.5, 5), layout="constrained")
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
    upper.legend(loc="lower right")
    figures = report.figures
    accuracy_and_ece = f"accuracy {figures['accuracy']:.3f}, ECE {figures['ece']:.3f}"
    upper.set_title(f"{figures['pairs']:.0f} pairs, {accuracy_and_ece}", fontsize="medium")
    widths = [b.high - b.low for b in bins]
    lower.bar([b.low for b in bins], [b.count for b in bins], widths, align="edge", edgecolor="w")
    lower.set(xlabel="confidence, sigmoid(|margin|)", ylabel="pairs")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()
