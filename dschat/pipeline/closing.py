"""Closing table of a pipeline: what each stage came to, and where its model is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dschat.errors import UserError, brief
from dschat.pipeline.stage import Stage
from dschat.report.records import evaluations
from dschat.utils.printable import aligned, printable, step_of_start

# The figure of an evaluation by which a kind of stage is judged.
FIGURES = {"sft": "perplexity", "reward": "accuracy", "dpo": "accuracy", "ppo": "reward"}
NORMAL_95 = 1.96  # standard errors on each side of a mean that make a 95 % interval
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
    for stage in stages:
        if stage.kind == "ppo" and stage.name in seconds:
            add_base(stage.folder)
    took = {stage.kind: seconds[stage.name] for stage in stages if stage.name in seconds}
    if embedded and took.keys() == EMBEDDED:
        from dschat.quickstart.report import print_report

        step_of_start("judging the answers of all models to the held-out prompts")
        by_step = {1: took["sft"], 2: took["reward"], 3: took["ppo"]}
        print_report(output_dir, by_step, seed)
        return
    print("\n" + "\n".join([*table(stages, seconds), *changes(stages)]))
    print(f"everything is in {output_dir}")
    talks = [stage.model for stage in stages if stage.kind != "reward" and stage.is_finished]
    if talks:
        print(f"chat with it: dschat chat {talks[-1]}")


def add_base(folder: Path) -> None:
    """Show the base's answers in a PPO run's page, where the run has one and the base is known.

    Whatever hinders it is one line: the models are written, and the page stays as it was.
    """
    from dschat.report.page import PAGE, write_page
    from dschat.rlhf.base_answers import base_of, write_base_answers

    if not (folder / PAGE).is_file():  # switched off
        return
    step_of_start("the base answers too, for the report of step 3")
    try:
        write_base_answers(folder, base_of(folder))
        step_of_start("drawing the report of step 3 with them")
        write_page(folder)
    except Exception as error:  # answers to look at are worth no run
        reason = brief(error, with_type=not isinstance(error, UserError))
        print(printable(f"the report of step 3 is without the base: {reason}"))


def table(stages: Sequence[Stage], seconds: Mapping[str, float]) -> list[str]:
    """Make the lines of a table: figure before and after, seconds."""
    rows = [("", "", "before", "after", "seconds")]
    for stage in stages:
        figure = FIGURES[stage.kind]
        values = [record[figure] for record in evaluations(stage.folder) if figure in record]
        before, after = (f"{values[0]:,.3f}", f"{values[-1]:,.3f}") if values else ("", "")
        took = f"{seconds[stage.name]:.0f}" if stage.name in seconds else "earlier"
        rows.append((stage.name, figure, before, after, took))
    return aligned(rows, texts=2)


def changes(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield a line for each stage whose figure has an error: what it changed by, and if by chance.

    The interval is Newcombe's (1998, method 10) for the difference of two figures with intervals of
    their own; as both are of the same rows, it is rather too wide.
    """
    for stage in stages:
        figure = FIGURES[stage.kind]
        ends = [record for record in evaluations(stage.folder) if figure in record]
        before, after = (_interval(ends[i], figure) for i in (0, -1)) if ends else (None, None)
        if len(ends) < 2 or before is None or after is None:
            continue
        (low, value, high), (new_low, new, new_high) = before, after
        change = new - value
        least = change - math.hypot(new - new_low, high - value)
        most = change + math.hypot(new_high - new, value - low)
        told = f"{figure} by {change:+.3f} (95 % interval {least:+.3f} to {most:+.3f})"
        yield f"{stage.name}: {told}" + (", within noise" if least <= 0 <= most else "")


def _interval(record: Mapping[str, float], figure: str) -> tuple[float, float, float] | None:
    """Lower end, value and upper end of a figure; None where nothing tells its error."""
    value, error = record[figure], record.get(f"{figure}_error")
    if error is not None:
        return value - NORMAL_95 * error, value, value + NORMAL_95 * error
    low, high = record.get(f"{figure}_low"), record.get(f"{figure}_high")
    return None if low is None or high is None else (low, value, high)
