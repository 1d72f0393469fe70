"""Files and folders that are written once, completely or not at all, by the first process.

A name is a digest of what its content is made of, so what stands under a name is never stale. The
lock is the operating system's: it ends with the process that holds it, however that ends.
"""

import ctypes
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dschat.errors import UserError

_LOCKS, _PART = ".locks", ".tmp"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_writing: set[Path] = set()  # what this process is writing


def written_once(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Give `root / name`, which `write(path)` writes under another name first unless it is there.

    Other processes of this machine that want it wait for the first one, and take over when that is
    killed. What killed writers left under `root` is removed.

    Raises:
        UserError: `root` cannot be written or locked, or its disk is full; nothing is left over.
    """
    target = root / name
    if target.exists():
        return target
    try:
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _LOCKS / name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{target}: another process writes it, waiting", flush=True)
            lock.acquire(poll_interval=0.1)
        try:
            if not target.exists():
                _sweep(root, name)
                _write(target, write)
        finally:
            lock.release()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{root} cannot be written ({reason}): free some space or give another data_output_path"
        ) from error
    return target


def _write(target: Path, write: Callable[[Path], None]) -> None:
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}{_PART}")
    _writing.add(target)
    try:
        write(part)
        part.rename(target)
    finally:
        _writing.discard(target)
        _remove(part)


def _sweep(root: Path, name: str) -> None:
    """Remove the unfinished files of processes that are gone: nobody holds their locks."""
    for part in root.glob(f"*{_PART}"):
        owner = part.name.rsplit(".", 2)[0]
        if owner == name:  # this process holds its lock
            _remove(part)
            continue
        try:
            with FileLock(root / _LOCKS / owner, blocking=False):
                _remove(part)
        except Timeout:
            pass


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_child() -> None:
    """End a process that was forked in the middle of writing with its parent.

    A worker would outlive a killed parent, waiting for work that does not come.
    """
    if _writing and sys.platform == "linux":
        _writing.clear()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


os.register_at_fork(after_in_child=_in_child)
