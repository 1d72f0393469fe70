"""Run stages one after the other, up to the first that fails; what is finished stays."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dschat.errors import UserError
from dschat.pipeline.stage import Stage
from dschat.train import fork_server, launch, run_lock, signals
from dschat.utils.printable import fitted, printable, window

# What takes the stages seconds to import.
IMPORTED = (
    "dschat.train.prepare",
    "dschat.rlhf.prepare",
    "dschat.plan.start",
    "dschat.models.reward_model",
    "deepspeed",
    "transformers.processing_utils",
    "transformers.modeling_layers",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
)


def hold_output(output_dir: Path, stages: Sequence[Stage], replaces: bool, dash: str) -> None:
    """Make and hold the output folder.

    Args:
        replaces: finished models may be replaced, or are skipped.
        dash: between the words of the program's flags, `-` or `_`.

    Raises:
        UserError: it cannot be made, another run holds it, or a model would be replaced.
    """
    flag, overwrite = f"--output{dash}dir", f"--overwrite{dash}output{dash}dir"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {output_dir}: {error.strerror}; give a folder") from error
    run_lock.hold(output_dir)
    for stage in () if replaces else stages:
        if stage.is_finished:
            raise UserError(
                f"{flag} {output_dir}: {stage.folder} holds a finished model; give another "
                f"{flag}, or {overwrite} to replace it"
            )


def ready_to_fork(
    of_one_process: bool, files: Sequence[Path] = ()
) -> contextlib.AbstractContextManager[None]:
    """Import in the background what stages of one process need, which then start at once.

    Args:
        files: programs of stages, besides `python -m dschat`.
    """
    return fork_server.running(IMPORTED, files) if of_one_process else contextlib.nullcontext()


def unfinished(stages: Sequence[Stage]) -> list[Stage]:
    """Leave out the stages that finished before, and name them."""
    left = []
    for stage in stages:
        if stage.is_finished:
            print(f"{stage.name}: finished before, its model is in {stage.folder}")
        else:
            left.append(stage)
    return left


def run_stage(stage: Stage, log: Path | None = None) -> float:
    """Run one stage; returns its seconds, ends the program when it fails or a signal stops it.

    Args:
        log: a file that gets what it prints as well.
    """
    command = shlex.join(stage.command)
    if window() is not None:  # a script's command is longer than any window
        its_log = stage.folder / "training.log" if log is None else log
        command = f"what follows is in {os.path.relpath(its_log)}"
    print("\n" + fitted(f"== {stage.name}: {printable(command, keep='')}", window()), flush=True)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # `python` and `deepspeed` in a script are those of the environment that runs this.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    code = launch.run(stage.command, log=log, environ=os.environ | {"PATH": path})
    if code == signals.STOPPED:  # the stage has said how to go on
        sys.exit(code)
    if code != 0:
        print(f"error: {stage.name} failed with exit code {code}", file=sys.stderr)
        sys.exit(code)
    return time.perf_counter() - start


def run_all(
    stages: Sequence[Stage], run: Callable[[Stage], float] = run_stage
) -> Mapping[str, float]:
    """Run all stages; returns the seconds of each by its name."""
    signals.restore()  # from here they are the stages'
    return {stage.name: run(stage) for stage in stages}
