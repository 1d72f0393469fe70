"""From results of runs to what they say: means, winners, steps saved, widths, tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lora_plus.training import Outcome, Run

Cell = tuple[float, float]  # (eta_A, eta_B)
Grid = dict[Cell, float | None]  # mean evaluation loss; None where a seed diverged
Results = dict[Run, Outcome]
Curve = Sequence[tuple[int, float]]

TOLERANCE = 0.02  # a basin ends where the loss is this share above its best


@dataclass(frozen=True)
class AlphaLine:
    """Losses over eta_A at one lambda, with alpha a multiple of the rank."""

    ratio: float
    alpha: float
    losses: Grid


@dataclass(frozen=True)
class Fresh:
    """One winner on seeds that it was not chosen by."""

    cell: Cell
    outcomes: dict[int, list[Outcome]]  # steps of a full schedule -> one for each seed

    @property
    def budget(self) -> int:
        """The steps of the longest schedule, which is the one all cells had."""
        return max(self.outcomes)

    def losses(self, steps: int | None = None) -> list[float | None]:
        """The final loss of every seed (default: with the whole budget)."""
        return [outcome.loss for outcome in self.outcomes[steps or self.budget]]


def mean(losses: Iterable[float | None]) -> float | None:
    """The mean, or None where one of them diverged."""
    values = list(losses)
    return None if None in values else statistics.fmean(values)


def grid_means(
    results: Mapping[Run, Outcome],
    init: str,
    cells: Iterable[Cell],
    seeds: Sequence[int],
    steps: int,
    alpha: float = 1.0,
) -> Grid:
    """The mean loss of each cell over the seeds."""
    return {
        (a, b): mean(results[Run(init, a, b, seed, steps, alpha)].loss for seed in seeds)
        for a, b in cells
    }


def diagonal(grid: Grid, ratio: float | None) -> list[Cell]:
    """The cells of one lambda (None: all) in the order of eta_A."""
    return sorted(cell for cell in grid if ratio is None or cell[1] / cell[0] == ratio)


def best_cell(grid: Grid, ratio: float | None = None) -> Cell | None:
    """The cell of least loss, of one lambda or of all; None where all have diverged."""
    alive = [cell for cell in diagonal(grid, ratio) if grid[cell] is not None]
    return min(alive, key=lambda cell: grid[cell], default=None)


def cell_beyond(grid: Grid, ratio: float) -> Cell | None:
    """The next cell of a diagonal whose best cell is its first or last, or None."""
    line, best = diagonal(grid, ratio), best_cell(grid, ratio)
    if best is None or best not in (line[0], line[-1]):
        return None
    factor = 0.5 if best == line[0] else 2.0
    return best[0] * factor, best[1] * factor


def basin_width(grid: Grid, ratio: float) -> tuple[float, bool]:
    """Over how many factors of two in eta_A the loss stays within `TOLERANCE` of its best.

    Straight lines in log2(eta_A) are drawn between cells, and end at a cell next to one that
    diverged. The flag says that the basin reaches the diagonal's end, so that it may be wider.
    """
    line, best = diagonal(grid, ratio), best_cell(grid, ratio)
    if best is None:
        return 0.0, False
    limit = grid[best] * (1 + TOLERANCE)
    middle = line.index(best)
    down, open_down = _reach([grid[cell] for cell in line[middle::-1]], limit)
    up, open_up = _reach([grid[cell] for cell in line[middle:]], limit)
    return down + up, open_down or open_up


def _reach(losses: Sequence[float | None], limit: float) -> tuple[float, bool]:
    """Count the leading cells whose loss stays below the limit; say if all do."""
    for i, (here, there) in enumerate(itertools.pairwise(losses)):
        if there is None:
            return float(i), False
        if there > limit:
            return i + (limit - here) / (there - here), False
    return len(losses) - 1.0, True


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """The mean over seeds at each evaluated step; empty where a seed diverged."""
    steps = [[step for step, _ in curve] for curve in curves]
    if not curves or any(other != steps[0] for other in steps):
        return []
    columns = zip(*curves, strict=True)
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in columns]


def steps_to_reach(curve: Curve, target: float) -> float | None:
    """The first step at which the loss is down to the target, on straight lines between points.

    The first point itself where that is already low enough; None where no point is.
    """
    for i, (step, loss) in enumerate(curve):
        if loss <= target:
            if i == 0:
                return float(step)
            before, above = curve[i - 1]
            return before + (step - before) * (above - target) / (above - loss)
    return None


def _spread(losses: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation and number of losses."""
    average = mean(losses)
    wide = average is not None and len(losses) > 1
    deviation = statistics.stdev(losses) if wide else None
    return {"mean": average, "sd": deviation, "seeds": len(losses)}


def _point(grid: Grid, cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {"eta_A": cell[0], "eta_B": cell[1], "ratio": cell[1] / cell[0], "loss": grid[cell]}


def _per_ratio(grid: Grid, full_best: Cell | None) -> list[dict[str, Any]]:
    rows = []
    for ratio in sorted({b / a for a, b in grid}):
        best = best_cell(grid, ratio)
        if best is None:
            continue
        width, is_open = basin_width(grid, ratio)
        relative = best[0] / full_best[0] if full_best else None
        rows.append(
            _point(grid, best)
            | {"cells": len(diagonal(grid, ratio)), "on_edge": bool(cell_beyond(grid, ratio))}
            | {"over_full": relative, "basin": width, "basin_open": is_open}
        )
    return rows


def _ratio_on_edge(grid: Grid) -> bool:
    """True where the best cell has the smallest or the largest lambda that was tried."""
    best, ratios = best_cell(grid), {b / a for a, b in grid}
    return best is not None and best[1] / best[0] in (min(ratios), max(ratios))


def _against(fresh: Fresh, plain: Fresh) -> dict[str, Any]:
    """Gain of a winner over that of lambda 1, by seed, and steps to the same final loss."""
    pairs = zip(plain.losses(), fresh.losses(), strict=True)
    gains = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    target = mean(plain.losses())
    curve = mean_curve([outcome.curve for outcome in fresh.outcomes[fresh.budget]])
    finals = [(steps, mean(fresh.losses(steps))) for steps in sorted(fresh.outcomes)]
    known = [(steps, loss) for steps, loss in finals if loss is not None]
    return {
        "gain": _spread(gains),
        "target": target,
        "budget": fresh.budget,
        "curve": curve,
        "steps_on_curve": None if target is None else steps_to_reach(curve, target),
        "schedules": finals,
        "steps_of_schedule": None if target is None else steps_to_reach(known, target),
    }


def summarise(
    grid: Grid, fresh: Mapping[str, Fresh], alphas: Sequence[AlphaLine], full: Grid
) -> dict[str, Any]:
    """Everything that one initialisation's runs say, ready for JSON and `tables.render`.

    Args:
        fresh: the winners of lambda `1`, `16` and `any`, those that there are.
    """
    plain = fresh.get("1")
    return {
        "cells": len(grid),
        "diverged": sum(loss is None for loss in grid.values()),
        "ratio_on_edge": _ratio_on_edge(grid),
        "per_ratio": _per_ratio(grid, best_cell(full)),
        "winners": {
            name: _point(grid, winner.cell)
            | {"fresh": _spread(winner.losses())}
            | {"against": _against(winner, plain) if plain and winner is not plain else None}
            for name, winner in fresh.items()
        },
        "alpha": [
            {"alpha": line.alpha, "cells": len(line.losses)}
            | (_point(line.losses, best_cell(line.losses)) or {"loss": None})
            | {"ratio": line.ratio, "on_edge": bool(cell_beyond(line.losses, line.ratio))}
            for line in alphas
        ],
    }


def full_rows(full: Grid) -> dict[str, Any]:
    """The line scan of all weights."""
    best = best_cell(full)
    rows = [{"eta": cell[0], "loss": full[cell]} for cell in diagonal(full, 1.0)]
    edge = bool(cell_beyond(full, 1.0))
    return {"best": best[0] if best else None, "on_edge": edge, "rates": rows}
