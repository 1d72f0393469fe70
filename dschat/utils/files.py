"""Files and disks: sync, exchange, digest, room, errors in one line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dschat.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in; the names of what is made are on the disk by then.

    A folder without a name there would take all that is synced inside along with it.
    """
    missing = []
    for place in (path, *path.parents):
        if place.exists():
            break
        missing.append(place)
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        with contextlib.suppress(PermissionError):  # which others may pass through, and not read
            sync(made.parent)


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, then every folder, itself the last."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def exchange(first: Path, second: Path) -> bool:
    """Swap two files or folders in one step; False where the system cannot, and nothing changes."""
    if sys.platform != "linux":
        return False
    names = os.fsencode(first), os.fsencode(second)
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # an old C library
        return False
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def regular(path: Path) -> Path:
    """Return the path, unless it leads to a pipe or a device: reading one might never end.

    Raises:
        UserError: it does.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a pipe or a device; put a file in its place, or remove it")
    return path


def write_anew(path: Path, data: bytes) -> None:
    """Write a file for this process alone, not through a link that stands under its name."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as a hexadecimal text.

    Raises:
        UserError: it is a pipe or a device.
    """
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_dir() and not path.is_symlink():
        return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir())
    return path.lstat().st_size


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


OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)


def disk_error(error: BaseException) -> OSError | None:
    """Find the system's reason, and the path where it is known, in an error of reading or writing.

    torch and safetensors put the reason into texts of their own, or raise other errors on top.

    Returns:
        None for errors of another kind.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            name = seen.filename
            name = os.fsdecode(name) if isinstance(name, bytes) else name
            return OSError(seen.errno, os.strerror(seen.errno), name)
        number = re.search(r"\(os error (\d+)\)", str(seen))
        known = (n for n in OF_DISKS if os.strerror(n) in str(seen))
        code = next(known, None) if number is None else int(number[1])
        if code is not None:
            return OSError(code, os.strerror(code))
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def disk_errors_named(
    place: str, remedy: Callable[[], str], path: str | Path = ""
) -> Iterator[None]:
    """Turn an error of writing in the block into one line: place, path, the system's reason.

    Args:
        path: what is written, for errors that do not say it. remedy: the rest of the line, asked
            for when it is needed.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        parts = (place, str(found.filename or path), found.strerror)
        raise UserError(f"{': '.join(p for p in parts if p)}; {remedy()}") from error
