"""Folders of checkpoints: find, check, publish when complete, and remove old ones.

OUTPUT_DIR/checkpoints holds `step-000040` and the like. One that is being written or removed has a
name that begins with a dot, so a folder under its plain name is complete, whenever a process dies.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dschat.errors import UserError

RECORD = "state.json"
FORMAT = 2  # of the folder; raise it when older checkpoints cannot be resumed any more
NEWEST = "newest"  # the value of --resume without one
_NAME = re.compile(r"step-(\d{6,})")


def folder_of(output_dir: str | Path) -> Path:
    """Folder of the checkpoints of a run with this output folder."""
    return Path(output_dir) / "checkpoints"


def unfinished_path(folder: Path, step: int) -> Path:
    """Path of a step's checkpoint while it is being written, the same on all ranks."""
    return folder / f".step-{step:06d}.tmp"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Map the steps of all complete checkpoints to their paths, the oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    by_step = {int(m[1]): p for p in entries if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(by_step.items()))


def repair(output_dir: str | Path) -> None:
    """Tidy up after a process that died while it wrote or removed something here."""
    folder, output_dir = folder_of(output_dir), Path(output_dir).resolve()
    # Saving a model over the output folder moves it aside for a moment, checkpoints and all.
    aside = f".{glob.escape(output_dir.name)}.*.old/{folder.name}"
    if not folder.exists():
        for moved in sorted(output_dir.parent.glob(aside)):
            moved.rename(folder)
            break
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def choose(output_dir: str, resume: str | None, will_save: bool) -> Path | None:
    """Choose the checkpoint to resume from; None where the run starts from the beginning.

    Raises:
        UserError: there is no such folder, or new checkpoints would mix with those of another run.
    """
    folder = folder_of(output_dir)
    present = checkpoints_in(folder)
    if resume == NEWEST:
        return present[max(present)] if present else None
    if resume is not None and not Path(resume).is_dir():
        raise UserError(f"resume {resume}: no such folder; give a step-... folder, or no value")
    is_ours = resume is not None and Path(resume).resolve().parent == folder.resolve()
    if present and will_save and not is_ours:
        raise UserError(
            f"output_dir {output_dir}: holds checkpoints of an earlier run "
            f"({present[max(present)].name}); give resume to continue it, or remove {folder}"
        )
    return None if resume is None else Path(resume)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, with the size of every file beside it."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in _files(folder)}
    text = json.dumps({"format": FORMAT, **record, "files": files}, indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `write_record` wrote; check that every file is there and as long as it was.

    Raises:
        UserError: this is no checkpoint, or not all of it.
    """
    remedy = "remove the folder, or resume from another"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, files = record["format"], record["files"].items()
    except FileNotFoundError as error:
        raise UserError(
            f"resume {folder}: has no {RECORD}, so it is no checkpoint; give a step-... folder"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"resume {folder}: {RECORD} cannot be read; {remedy}") from error
    if version != FORMAT:
        raise UserError(f"resume {folder}: of format {version}, this code reads format {FORMAT}")
    for name, size in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"resume {folder}: {name} is missing; {remedy}")
        present = path.stat().st_size
        if present != size:
            raise UserError(
                f"resume {folder}: {name} has {present} bytes, saved were {size}; {remedy}"
            )
    return record


def publish(folder: Path, step: int, limit: int) -> None:
    """Give a finished checkpoint its name, then remove those that it makes superfluous.

    These are all but the newest `limit`, and checkpoints of later steps: a run that resumed from an
    earlier one will come to those steps again.
    """
    part, final = unfinished_path(folder, step), folder / f"step-{step:06d}"
    for path in (*_files(part), part):
        _to_disk(path)
    if final.exists():
        _remove(final)
    part.rename(final)
    _to_disk(folder)
    present = checkpoints_in(folder)
    newest = sorted(s for s in present if s <= step)[-limit:]
    for other in present.keys() - set(newest):
        _remove(present[other])


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _remove(checkpoint: Path) -> None:
    """Remove under a dotted name: half a checkpoint never has a plain one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
