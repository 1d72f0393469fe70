"""Files of lines that a run writes: an earlier run's is kept, a resumed run continues its own."""

from __future__ import annotations

import os
from pathlib import Path

from dschat.utils.files import regular, write_anew


def set_aside(path: Path) -> None:
    """Give an earlier run's file the first free number: metrics.jsonl becomes metrics.1.jsonl."""
    if not path.exists():
        return
    number = 1
    while (numbered := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(numbered)


def keep_longest(path: Path) -> None:
    """Keep one file of the starts that ended before a checkpoint: restarts may be many."""
    kept = path.with_suffix(f".unfinished{path.suffix}")
    if path.exists() and (not kept.exists() or path.stat().st_size >= kept.stat().st_size):
        path.replace(kept)
    path.unlink(missing_ok=True)


def restore_lines(path: Path, earlier: Path) -> None:
    """Make the file equal `earlier`; set aside one that begins otherwise: it is another run's."""
    lines = regular(earlier).read_bytes()
    if path.exists() and not regular(path).read_bytes().startswith(lines):
        set_aside(path)
    part = path.with_suffix(".tmp")
    write_anew(part, lines)
    os.replace(part, path)
