"""Reliability plot of a reward model: how often it is right, by how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.models.reward_statistics import EVALUATION_FILE
from dschat.report.drawing import png, reliability
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
    return png(reliability(report.reliability, report.figures))
