"""Files and folders that are written once, whole or not at all, by whichever process is first.

A name says what the content is made of, so what stands under a name is never stale. The lock is the
operating system's (`flock`): it ends with the process that holds it, however that ends.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dschat.errors import UserError

_LOCKS, _PART = ".locks", ".tmp"
_SECONDS_BETWEEN_TRIES = 0.1
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_held: set[int] = set()  # descriptors of the locks that this process holds


def written_once(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """`root / name`, which `write(path)` writes under another name first unless it is there.

    Other processes of this machine that want it wait for the first one, and take over when that is
    killed. What killed writers left under `root` is removed.

    Raises:
        UserError: `root` cannot be written or locked, or its disk is full; nothing is left behind.
    """
    target = root / name
    if target.exists():
        return target
    try:
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)
        with _locked(root, name, wait=True):
            if not target.exists():
                _sweep(root, name)
                _write(root, name, write)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{root} cannot be written ({reason}): free some space or give another "
            "--data_output_path"
        ) from error
    return target


def _write(root: Path, name: str, write: Callable[[Path], None]) -> None:
    part = root / f"{name}.{uuid.uuid4().hex}{_PART}"
    try:
        write(part)
        os.rename(part, root / name)
    finally:
        _remove(part)


def _sweep(root: Path, name: str) -> None:
    """Remove what was left unfinished by processes that are gone."""
    for part in root.glob(f"*{_PART}"):
        owner = part.name.rsplit(".", 2)[0]
        if owner == name:  # this process holds its lock
            _remove(part)
        else:
            with _locked(root, owner, wait=False) as is_mine:
                if is_mine:
                    _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(root: Path, name: str, wait: bool) -> Iterator[bool]:
    """Hold the lock of a name; without `wait`, only if nobody does, and says whether."""
    lock = os.open(root / _LOCKS / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_held = _lock(lock)
        if wait and not is_held:
            print(f"{root / name}: another process writes it, waiting", flush=True)
            while not _lock(lock):
                time.sleep(_SECONDS_BETWEEN_TRIES)
            is_held = True
        _held.add(lock)
        yield is_held
    finally:
        _held.discard(lock)
        os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_child() -> None:
    """Of a process forked in the middle of writing: it neither holds the lock nor outlives it.

    A worker would do both when its parent is killed: a lock lasts as long as any process has it
    open, and workers wait for work that does not come.
    """
    if not _held:
        return
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


os.register_at_fork(after_in_child=_in_child)
