"""Free bytes of disks, and bytes in words."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Reserve:
    """Bytes that will be written into a folder later."""

    folder: str
    size: int

    def on_disk_of(self, other: str | Path) -> int:
        """Bytes of them that come onto the disk of another folder: all or none."""
        here, there = _existing(self.folder), _existing(other)
        return self.size if here.stat().st_dev == there.stat().st_dev else 0


def _existing(folder: str | Path) -> Path:
    """Find the folder, or the nearest one above that is there."""
    path = Path(folder).expanduser().resolve()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(folder: str | Path) -> int:
    """Bytes free on the disk that holds a folder, or would hold it."""
    return shutil.disk_usage(_existing(folder)).free


def in_words(size: float) -> str:
    """Format bytes: 12.3 GB."""
    for unit in _UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {_UNITS[-1]}"
