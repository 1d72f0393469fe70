"""Checks of all stages before the first one trains, and the flags that suit their rows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.pipeline.stage import Stage

if TYPE_CHECKING:
    from dschat.config.preflight import StepAhead
    from dschat.utils.distributed import Distributed


def check_ahead(
    stages: Sequence[Stage],
    output_dir: Path,
    ranks: int | None,
    fixed: Sequence[str] = (),
    fit: bool = True,
) -> list[Stage]:
    """Check every stage's settings, models, rows, folders and disk; print a line on each.

    Args:
        ranks: that train; None for as many as there are GPUs.
        fixed: flags that are the user's choice.
        fit: add the flags that suit rows and models better than those that are given.

    Returns:
        The stages, with these flags.

    Raises:
        UserError: what would stop a stage, after its name.
    """
    import torch

    from dschat.utils.distributed import Distributed
    from dschat.utils.printable import fitted, window

    count = ranks or max(torch.cuda.device_count(), 1)
    process = Distributed(0, count, 0, torch.device("cpu"))
    stand_ins: dict[str, str] = {}
    found, result = [], []
    print("checking all steps", flush=True)
    for stage in stages:
        ahead = _look_at(stage, stand_ins, process, fixed, fit)
        words = [word for name, value in ahead.flags.items() for word in (f"--{name}", str(value))]
        flags = words if fit else []
        result.append(stage.with_flags(*flags))
        found.append(ahead)
        stand_ins[str(stage.model)] = ahead.model
        for line in _lines(stage, ahead, flags):
            print(fitted(line, window()))
    print(fitted(_check_folders(output_dir, found), window()), flush=True)
    return result


def _look_at(
    stage: Stage,
    stand_ins: Mapping[str, str],
    process: Distributed,
    fixed: Sequence[str],
    fit: bool,
) -> StepAhead:
    """Check one stage; what its program would print of it is not shown."""
    from dschat.config.preflight import look_ahead

    widths = stage.widths if fit else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return look_ahead(stage.kind, stage.argv, stand_ins, process, fixed, widths)
    except UserError as error:
        raise UserError(f"{stage.name}: {error}") from error


def _check_folders(output_dir: Path, found: Sequence[StepAhead]) -> str:
    """Check that the disk has room for the models of all stages; describe it in one line."""
    from dschat.train.disk import check_disk
    from dschat.utils.files import free_bytes, in_words

    written = [one for ahead in found for one in ahead.written]
    check_disk(str(output_dir), written, checkpoints=0)
    size, free = in_words(sum(w.folders for w in written)), in_words(free_bytes(output_dir))
    return f"model folders: {size}, of {free} free in {output_dir}"


def _lines(stage: Stage, ahead: StepAhead, flags: Sequence[str]) -> Iterator[str]:
    """Yield what a stage will train, and on what."""
    yield f"{stage.name}: {ahead.model}, {ahead.rows} rows, {ahead.length.steps} optimizer steps"
    if stage.remark:
        yield f"  {stage.remark}"
    if flags:
        yield f"  chosen by rows and model: {' '.join(flags)}"
    yield from (f"  {line}" for line in ahead.length.advice())
