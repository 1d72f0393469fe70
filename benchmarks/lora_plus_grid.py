"""Does LoRA+ matter, and with which ratio, rate and alpha? A grid of learning rates answers.

One model is fine-tuned with LoRA at every pair (eta_A, eta_B) of a lattice of powers of two, with
several seeds and one budget of optimizer steps, in one process without the DeepSpeed engine. The
winners are run again on fresh seeds; all weights are trained too, for the rate that adapters are
compared with. It prints tables and writes `summary.json` and a heat map for each initialisation,
with `--ratios` the losses along these lambdas alone.

    python -m benchmarks.lora_plus_grid --output_dir work
    python -m benchmarks.lora_plus_grid --output_dir work-hh --task hh \
      --model_name_or_path ./model --data_path ./hh_rlhf
    python -m benchmarks.lora_plus_grid --output_dir work-dpo --task dpo --ratios 1 16 --init A \
      --model_name_or_path ./sft --data_path ./stories

Every finished run is a line of `OUTPUT_DIR/results.jsonl` and is not repeated, so that a benchmark
that was stopped goes on, and one with a wider lattice runs only what is new.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.lora_plus import report
from benchmarks.lora_plus.bench import Bench
from benchmarks.lora_plus.heat_map import heat_map
from benchmarks.lora_plus.lines import write_lines
from benchmarks.lora_plus.settings import GridSettings
from benchmarks.lora_plus.tables import render
from benchmarks.lora_plus.training import Run
from dschat.config.cli import parse, run_cli
from dschat.errors import UserError

RATIOS = [2.0**k for k in range(7)]  # lambdas whose optimum must lie inside the lattice
ALPHA_RATIOS = (1.0, 16.0)
SHARES = (0.25, 0.5, 0.75)
GROWTHS = 4  # rounds in which a diagonal whose best cell is its first or last may grow


def cells_runs(
    init: str, cells: list[report.Cell], seeds: list[int], steps: int, alpha: float = 1.0
) -> list[Run]:
    """One run for each seed and cell, seed by seed."""
    return [Run(init, a, b, seed, steps, alpha) for seed in seeds for a, b in cells]


def run_cells(
    bench: Bench,
    title: str,
    init: str,
    cells: Iterable[report.Cell],
    ratios: Iterable[float],
    alpha: float = 1.0,
) -> report.Grid:
    """Mean losses of the cells, and of more until no line of `ratios` is best at its end.

    The line of the best cell of all is grown as well, whatever its lambda.
    """
    s = bench.settings
    done: list[report.Cell] = []
    missing = list(cells)
    for _ in range(1 + GROWTHS):
        bench.run(title, cells_runs(init, missing, s.grid_seeds, s.budget, alpha))
        done += missing
        grid = report.grid_means(bench.results, init, done, s.grid_seeds, s.budget, alpha)
        best = report.best_cell(grid)
        lines = {*ratios, best[1] / best[0]} if best else {*ratios}
        missing = [cell for ratio in sorted(lines) if (cell := report.cell_beyond(grid, ratio))]
        title = f"{title.removesuffix(', grown')}, grown"
        if not missing:
            break
    return grid


def run_alphas(bench: Bench, init: str, grid: report.Grid) -> list[report.AlphaLine]:
    """At lambda 1 and 16: the grid's own line, and one with alpha twice the rank."""
    lines = []
    for ratio in ALPHA_RATIOS:
        best = report.best_cell(grid, ratio)
        if best is None:
            continue
        line = {cell: grid[cell] for cell in report.diagonal(grid, ratio)}
        around = [(best[0] * f, best[1] * f) for f in (0.25, 0.5, 1.0)]
        title = f"init {init}, lambda {ratio:g}, alpha 2 r"
        twice = run_cells(bench, title, init, around, [ratio], alpha=2.0)
        lines += [report.AlphaLine(ratio, 1.0, line), report.AlphaLine(ratio, 2.0, twice)]
    return lines


def run_fresh(bench: Bench, init: str, grid: report.Grid) -> dict[str, report.Fresh]:
    """The winners of lambda 1, 16 and any on fresh seeds; beyond lambda 1 with less steps too."""
    s, found = bench.settings, {}
    for name, ratio in (("1", 1.0), ("16", 16.0), ("any", None)):
        cell = report.best_cell(grid, ratio)
        if cell is None:
            continue
        shares = (1,) if name == "1" or s.ratios else (*SHARES, 1)
        budgets = [round(x * s.budget) for x in shares]
        runs = [run for steps in budgets for run in cells_runs(init, [cell], s.fresh_seeds, steps)]
        if name != "1":
            every = max(1, s.budget // 10)
            runs = [
                dataclasses.replace(run, eval_every=every) if run.steps == s.budget else run
                for run in runs
            ]
        bench.run(f"init {init}, best of lambda {name}, fresh seeds", runs)
        outcomes = {
            steps: [bench.results[run] for run in runs if run.steps == steps] for steps in budgets
        }
        found[name] = report.Fresh(cell, outcomes)
    if "any" not in found:
        raise UserError(f"every cell of init {init} diverged: give smaller --eta_A and --eta_B")
    return found


def main() -> None:
    """Run what is missing, then print the tables and write summary and heat maps."""
    settings = parse(GridSettings, None, __doc__)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # diverging runs are full of them and would crawl
    bench = Bench(settings)
    full: report.Grid = {}
    if settings.ratios is None:
        first, last = settings.preset.eta_full
        rates = [2.0**k for k in range(first, last + 1)]
        full = run_cells(bench, "all weights", "full", zip(rates, rates, strict=True), [1.0])
    summaries, figures = {}, Path(settings.figures_dir)
    figures.mkdir(parents=True, exist_ok=True)
    for init in settings.init:
        lines = settings.ratios or RATIOS
        grid = run_cells(bench, f"grid, init {init}", init, settings.lattice(init), lines)
        fresh = run_fresh(bench, init, grid)
        alphas = [] if settings.ratios else run_alphas(bench, init, grid)
        summaries[init] = report.summarise(grid, fresh, alphas, full)
        target = figures / f"lora_plus_{settings.task}_init{init}"
        if settings.ratios is None:
            title = f"{settings.task}, init {init}: evaluation loss after {settings.budget} steps"
            target.with_suffix(".svg").write_text(heat_map(grid, title), encoding="utf-8")
        else:
            seeds = settings.grid_seeds
            write_lines(
                target.with_suffix(".csv"), bench.results, init, grid, seeds, settings.budget
            )
        print(f"written: {target}", flush=True)
    everything = {"shared": settings.shared(), "full": report.full_rows(full), "init": summaries}
    path = Path(settings.output_dir) / "summary.json"
    path.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    print(render(everything))


if __name__ == "__main__":
    run_cli(main)
