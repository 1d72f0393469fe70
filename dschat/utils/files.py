"""Files that survive a kill or a power failure: sync, exchange, digest, errors in one line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dschat.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def sha256(path: Path) -> str:
    """SHA-256 of a file, as a hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir())
    return path.lstat().st_size


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)


def disk_error(error: BaseException) -> OSError | None:
    """Find the system's reason, and the path where it is known, in an error of reading or writing.

    torch and safetensors put the reason into texts of their own, or raise other errors on top.

    Returns:
        None for errors of another kind.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return OSError(seen.errno, os.strerror(seen.errno), seen.filename)
        number = re.search(r"\(os error (\d+)\)", str(seen))
        known = (n for n in _OF_DISKS if os.strerror(n) in str(seen))
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
