"""Folders of checkpoints: find, check, publish when complete, and remove old ones.

OUTPUT_DIR/checkpoints holds `step-000040` and so on. One that is being written or removed has a
name that begins with a dot, so a folder under its plain name is complete, whenever a process dies.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.utils.files import (
    disk_errors_named,
    exchange,
    regular,
    remove,
    sha256,
    size_of,
    sync,
    sync_tree,
)

RECORD = "state.json"
END = "finished"  # a file of the newest checkpoint: the run has written its model after it
FORMAT = 3  # of the folder; raise it when older checkpoints cannot be resumed any more
NEWEST = "newest"  # the value of --resume without one
_NAME = re.compile(r"step-(\d{6,})")
_REMEDY = "remove the folder, or resume from another"


def folder_of(output_dir: str | Path) -> Path:
    """Folder of the checkpoints of a run with this output folder."""
    return Path(output_dir) / "checkpoints"


def path_of(output_dir: str | Path, step: int) -> Path:
    """Path of a step's checkpoint."""
    return folder_of(output_dir) / f"step-{step:06d}"


def unfinished_path(folder: Path, step: int) -> Path:
    """Path of a step's checkpoint while it is being written, the same on all ranks."""
    return folder / f".step-{step:06d}.tmp"


def _aside(name: str) -> str:
    """Name of a checkpoint for the moment in which another takes its name."""
    return f".{name}.aside.tmp"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Map the steps of all complete checkpoints to their paths, the oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    by_step = {int(m[1]): p for p in entries if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(by_step.items()))


def repair(output_dir: str | Path) -> list[str]:
    """Remove what a process left that died while it wrote or removed a checkpoint here.

    Call it where no other run can be writing here.

    Returns:
        A line for each thing that was removed.
    """
    lines, folder = [], folder_of(output_dir)
    for aside in sorted(folder.glob(_aside("step-*"))):
        name = aside.name[1:].partition(".")[0]
        if not (folder / name).exists():
            aside.rename(folder / name)
            lines.append(f"{folder / name}: brought back, a killed run had moved it aside")
    for left in sorted(folder.glob(".step-*.tmp")):
        size = size_of(left)
        remove(left)
        lines.append(f"{left}: removed, a killed run left it unfinished ({size / 1e6:,.1f} MB)")
    return lines


def disk_errors(
    output_dir: str | Path, path: str | Path = ""
) -> contextlib.AbstractContextManager[None]:
    """Turn an error of writing in the block into one line with the newest checkpoint.

    Args:
        path: what is written, for errors that do not say it.

    Raises:
        UserError: in its place.
    """
    newest = functools.partial(last_good, output_dir)
    return disk_errors_named(f"output_dir {output_dir}", newest, path)


def last_good(output_dir: str | Path) -> str:
    """Say which checkpoint is the newest at the end of a run that cannot go on."""
    try:
        present = checkpoints_in(folder_of(output_dir))
    except OSError:
        present = {}
    if not present:
        return "the run stops, and there is no checkpoint; fix that, and start again"
    newest = present[max(present)]
    return f"the run stops, and its newest checkpoint is {newest}; fix that, and resume"


def continues(output_dir: str | Path, resume: str | None) -> bool:
    """Return whether a run resumes from a checkpoint of this very output folder."""
    folder = folder_of(output_dir)
    if resume == NEWEST:
        return bool(checkpoints_in(folder))
    return resume is not None and Path(resume).resolve().parent == folder.resolve()


def choose(output_dir: str, resume: str | None) -> list[Path]:
    """Checkpoints to resume from, the best first; none where the run starts from the beginning.

    Only without a value has `resume` more than one: older ones stand in for a damaged newest.

    Raises:
        UserError: there is no such folder, or new checkpoints would mix with those of another run.
    """
    folder = folder_of(output_dir)
    present = checkpoints_in(folder)
    if resume == NEWEST:
        return list(reversed(present.values()))
    if resume is not None and not Path(resume).is_dir():
        raise UserError(f"resume {resume}: no such folder; give a step-... folder, or no value")
    if present and not continues(output_dir, resume):
        raise UserError(
            f"output_dir {output_dir}: holds checkpoints of an earlier run "
            f"({present[max(present)].name}); give resume to continue it, or remove {folder}"
        )
    return [] if resume is None else [Path(resume)]


def digests_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each of these files, as a hexadecimal text."""
    return {name: sha256(folder / name) for name in names}


def names_in(folder: Path) -> list[str]:
    """Paths of all files of a checkpoint but its record, relative to it and sorted."""
    return sorted(str(p.relative_to(folder)) for p in _files(folder) if p != folder / RECORD)


def write_record(folder: Path, record: dict[str, Any], digests: Mapping[str, str]) -> None:
    """Write the record with the digest of every file beside it, and its own."""
    record = {"format": FORMAT, "end": END, **record, "files": dict(digests)}
    record["digest"] = _digest_of(record)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `write_record` wrote; the record is as it was, and every file is there.

    Raises:
        UserError: this is no checkpoint, or not all of it.
    """
    try:
        record = json.loads(regular(folder / RECORD).read_text(encoding="utf-8"))
        version = record["format"]
    except FileNotFoundError as error:
        raise UserError(
            f"resume {folder}: has no {RECORD}, so it is no checkpoint; give a step-... folder"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"resume {folder}: {RECORD} cannot be read; {_REMEDY}") from error
    if version != FORMAT:
        raise UserError(f"resume {folder}: of format {version}, this code reads format {FORMAT}")
    if record.pop("digest", None) != _digest_of(record):
        raise UserError(f"resume {folder}: {RECORD} is not as it was written; {_REMEDY}")
    _check_shape(folder, record)
    for name in record["files"]:
        if not (folder / name).is_file():
            raise UserError(f"resume {folder}: {name} is missing; {_REMEDY}")
    for name in names_in(folder):  # DeepSpeed looks for files by their names
        if "/" in name and name not in record["files"]:
            raise UserError(f"resume {folder}: {name} is no file of this checkpoint; remove it")
    return record


def _check_shape(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that somebody has made by hand."""
    wanted: dict[str, type] = {name: int for name in ("step", "epoch", "batch", "processes")} | {
        "kind": str
    }
    wanted |= {name: dict for name in ("engines", "settings", "frozen_weights", "files")}
    for name, kind in wanted.items():
        value = record.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise UserError(f"resume {folder}: {RECORD} holds {name} {value!r:.40}; {_REMEDY}")
    rates = [e.get("peak_rates") for e in record["engines"].values() if isinstance(e, dict)]
    if len([r for r in rates if isinstance(r, dict)]) < len(record["engines"]):
        raise UserError(f"resume {folder}: {RECORD} holds an engine without its rates; {_REMEDY}")
    for name in record["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"resume {folder}: {RECORD} names {name}, which is outside; {_REMEDY}")


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Check that each of these files holds the bytes that were saved.

    Raises:
        UserError: naming the first that does not.
    """
    for name, digest in digests.items():
        try:
            same = digests_of(folder, [name])[name] == digest
        except OSError as error:
            raise UserError(f"resume {folder}: {name}: {error.strerror}; {_REMEDY}") from error
        if not same:
            raise UserError(f"resume {folder}: {name} is damaged; {_REMEDY}")


def _digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def publish(folder: Path, step: int, limit: int) -> None:
    """Rename a finished checkpoint to its final name, then remove superseded ones.

    These are all but the newest `limit`, and checkpoints of later steps: a run that resumed from an
    earlier one will come to those steps again.
    """
    part, final = unfinished_path(folder, step), folder / f"step-{step:06d}"
    sync_tree(part)
    aside = folder / _aside(final.name)
    if not (final.exists() and exchange(part, final)):
        if final.exists():
            final.rename(aside)
        part.rename(final)
    sync(folder)
    for before in (part, aside):  # what stood there
        remove(before)
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
    remove(hidden)
