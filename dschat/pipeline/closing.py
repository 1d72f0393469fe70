"""Closing table of a pipeline: what each stage came to, and where its model is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dschat.pipeline.stage import Stage

# The figure of an evaluation by which a kind of stage is told.
FIGURES = {"sft": "perplexity", "reward": "accuracy", "dpo": "accuracy", "ppo": "reward"}
EMBEDDED = {"sft", "reward", "ppo"}  # stages that the embedded default's own report is about


def close(
    output_dir: Path,
    stages: Sequence[Stage],
    seconds: Mapping[str, float],
    seed: int,
    embedded: bool = False,
) -> None:
    """Print what all stages came to; of the whole embedded default its own report.

    Args:
        seconds: of the stages that ran now, by name.
    """
    took = {stage.kind: seconds[stage.name] for stage in stages if stage.name in seconds}
    if embedded and took.keys() == EMBEDDED:
        from dschat.quickstart.report import print_report

        by_step = {1: took["sft"], 2: took["reward"], 3: took["ppo"]}
        print_report(output_dir, by_step, seed)
        return
    print("\n" + "\n".join(table(stages, seconds)))
    print(f"everything is in {output_dir}")
    talks = [stage.model for stage in stages if stage.kind != "reward" and stage.is_finished]
    if talks:
        print(f"chat with it: dschat chat {talks[-1]}")


def table(stages: Sequence[Stage], seconds: Mapping[str, float]) -> Iterator[str]:
    """Yield the lines of a table: figure before and after, seconds, model."""
    rows = [("", "", "before", "after", "seconds")]
    for stage in stages:
        figure = FIGURES[stage.kind]
        values = [record[figure] for record in evaluations(stage.folder) if figure in record]
        before, after = (f"{values[0]:,.3f}", f"{values[-1]:,.3f}") if values else ("", "")
        took = f"{seconds[stage.name]:.0f}" if stage.name in seconds else "earlier"
        rows.append((stage.name, figure, before, after, took))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, figure, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        yield "  ".join([name.ljust(widths[0]), figure.ljust(widths[1]), *padded])


def evaluations(folder: Path) -> list[dict]:
    """Read the evaluation records of a run, in order; none where it wrote none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "eval"]
