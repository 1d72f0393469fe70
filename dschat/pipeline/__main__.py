"""Run the stages that one file describes: SFT, reward model, DPO, PPO, in its order.

    dschat run quickstart
    dschat run recipe.yaml --data_path ./pairs.jsonl --dry_run
    dschat run recipe.yaml --data_path ./pairs.jsonl --save_steps 100 --resume

The first word is a file, or the name of one that comes with the library. All stages are checked
before the first one trains: settings, models, rows, folders and disk. Each writes into a folder of
its own below --output_dir, with a training.log; the closing table has what each came to.
"""

from __future__ import annotations

if __name__ == "__main__":  # first: signals may come during the imports, which take seconds
    from dschat.train import signals
    from dschat.utils.printable import step_of_start

    signals.start()
    step_of_start("starting: libraries, then the checks of all steps")

import sys
from pathlib import Path

from dschat.config.cli import parse, run_cli
from dschat.errors import UserError
from dschat.lazy import torch
from dschat.pipeline.ahead import check_ahead
from dschat.pipeline.closing import close
from dschat.pipeline.pipeline_settings import PipelineSettings
from dschat.pipeline.recipe import EMBEDDED, Pipeline, find, read, shipped
from dschat.pipeline.run import hold_output, ready_to_fork, run_all, run_stage, unfinished
from dschat.pipeline.stage import PASSED, Stage


def execute(pipeline: Pipeline) -> None:
    """Check all stages, run those that are left, print the closing table."""
    settings, stages = pipeline.settings, list(pipeline.stages)
    out = Path(settings.output_dir).resolve()
    for line in pipeline.unused:
        print(line, flush=True)
    if settings.hardware == "single_node" and not (settings.ranks or torch.cuda.is_available()):
        raise UserError("hardware single_node: torch sees no GPU here; give ranks for the CPU")
    hold_output(out, stages, settings.overwrite_output_dir or settings.resume, dash="_")
    with ready_to_fork(settings.processes == 1 and not settings.dry_run):
        _execute(settings, stages, out)


def _execute(settings: PipelineSettings, stages: list[Stage], out: Path) -> None:
    if settings.model == EMBEDDED:
        from dschat.quickstart import build
        from dschat.utils.printable import step_of_start

        step_of_start("making a small model and its data")
        build(out, settings.seed)
    left = unfinished(stages) if settings.resume else stages
    fixed = [name for name in PASSED if getattr(settings, name) is not None]
    left = check_ahead(left, out, settings.processes, fixed, fit=settings.fit_to_rows)
    if not settings.dry_run:
        seconds = run_all(left, logged)
        close(out, stages, seconds, settings.seed, embedded=settings.model == EMBEDDED)


def logged(stage: Stage) -> float:
    """Run a stage, with a log in its folder."""
    return run_stage(stage, stage.folder / "training.log")


def main() -> None:
    """Run the pipeline that the first word names."""
    description = f"{(__doc__ or '').strip()}\n\nThe library has {', '.join(shipped())}."
    name, *argv = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        parse(PipelineSettings, ["--help"], description)
    if not name or name.startswith("-"):
        raise UserError("name a pipeline first: a file, or one of those in dschat run --help")
    execute(read(find(name), argv, description))


if __name__ == "__main__":
    run_cli(main)
