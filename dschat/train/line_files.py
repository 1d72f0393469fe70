"""Files of lines that a run writes: an earlier run's is kept, a resumed run continues its own."""

from __future__ import annotations

import os
from pathlib import Path

from dschat.report.records import ANSWERS, HELD_OUT, METRICS
from dschat.utils.distributed import print_rank_0
from dschat.utils.files import regular, write_anew

KEPT = (METRICS, ANSWERS, HELD_OUT)  # of which every checkpoint has a copy


def set_aside(path: Path) -> Path | None:
    """Rename an earlier run's file to the first free number: metrics.jsonl to metrics.1.jsonl.

    Returns:
        Its new path; None where there was no file.
    """
    if not path.exists():
        return None
    number = 1
    while (numbered := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(numbered)
    return numbered


def keep_longest(path: Path) -> None:
    """Keep one file of the starts that ended before a checkpoint: restarts may be many."""
    kept = path.with_suffix(f".unfinished{path.suffix}")
    if path.exists() and (not kept.exists() or path.stat().st_size >= kept.stat().st_size):
        path.replace(kept)
    path.unlink(missing_ok=True)


def restore_lines(path: Path, earlier: Path, begin: bytes | None = None) -> None:
    """Make the file equal `earlier`; set aside, and say, one that begins otherwise.

    It is another run's, or damaged.

    Args:
        begin: what it must begin with; None: all of `earlier`.
    """
    lines = regular(earlier).read_bytes()
    begin = lines if begin is None else begin
    if path.exists() and not regular(path).read_bytes().startswith(begin):
        kept = set_aside(path)
        assert kept is not None
        print_rank_0(f"{path}: begins otherwise than the checkpoint's; kept as {kept.name}")
    part = path.with_suffix(".tmp")
    write_anew(part, lines)
    os.replace(part, path)
