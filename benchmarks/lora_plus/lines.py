"""Losses along the lambdas of a grid as rows of a CSV, which `benchmarks.curves` draws."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.lora_plus.report import Cell, Results
from benchmarks.lora_plus.training import Run

HEAD = ("ratio", "eta_A", "loss", "lowest", "highest", "accuracy")


def write_lines(
    path: Path, results: Results, init: str, cells: Iterable[Cell], seeds: Sequence[int], steps: int
) -> None:
    """Write a row for each cell that did not diverge: mean, least and greatest of the seeds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(HEAD)
        for a, b in sorted(cells, key=lambda cell: (cell[1] / cell[0], cell[0])):
            found = [results[Run(init, a, b, seed, steps)] for seed in seeds]
            losses = [outcome.loss for outcome in found if outcome.loss is not None]
            if len(losses) < len(found):
                continue
            right = [outcome.accuracy for outcome in found if outcome.accuracy is not None]
            figures = (statistics.fmean(losses), min(losses), max(losses))
            accuracy = f"{statistics.fmean(right):.4f}" if right else ""
            rows.writerow([f"{b / a:g}", f"{a:.8g}", *(f"{x:.4f}" for x in figures), accuracy])
