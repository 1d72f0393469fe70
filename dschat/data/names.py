"""Names of data sources: which of them are paths."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet")


def is_spelt_as_path(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Return whether a name means a file or folder by its spelling, whether or not it is there."""
    return name.startswith((".", os.sep, "~")) or Path(name).suffix in suffixes
