"""The note at a checkpoint by which a pipeline knows a run that ended from one that was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dschat.train.checkpoint_folder import END, RECORD, checkpoints_in, disk_errors, folder_of
from dschat.utils.files import sync


def mark_end(output_dir: str | Path) -> None:
    """Note at the newest checkpoint, where there is one, that the model after it is written."""
    saved = checkpoints_in(folder_of(output_dir))
    if saved:
        newest = saved[max(saved)]
        with disk_errors(output_dir, newest):
            (newest / END).touch()
            sync(newest)


def has_ended(output_dir: str | Path, files: Sequence[Path]) -> bool:
    """Return whether a run wrote these files of a model after its newest checkpoint.

    Checkpoints say it by a note, whatever the clock showed; those of versions without one by it.
    """
    saved = checkpoints_in(folder_of(output_dir))
    if not saved:
        return True
    newest = saved[max(saved)]
    try:
        notes = json.loads((newest / RECORD).read_text(encoding="utf-8")).get("end") == END
    except (OSError, ValueError, AttributeError, RecursionError):
        notes = False
    if notes:
        return (newest / END).is_file()
    written = max(file.stat().st_mtime for file in files)
    return all((path / RECORD).stat().st_mtime <= written for path in saved.values())
