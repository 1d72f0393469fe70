"""The folder of sets that are kept: written once, whole or not at all, and verified when opened.

A set is a folder of files under a key, a digest of what its content is made of, so what stands
under a key is never stale; `digests.json` in it holds the SHA-256 of every file. The lock of a
writer is the operating system's: it ends with the process that holds it, however that ends.

Whoever can write in the folder decides which rows train. So it is the user's own, or one that the
user named and that no stranger can write in.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import stat
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from dschat.errors import UserError
from dschat.utils.files import disk_error, regular, remove, sha256, sync
from dschat.utils.printable import printable

RECORD = "digests.json"
_LOCKS, _PART = ".locks", ".tmp"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_writing: set[Path] = set()  # what this process is writing


def open_folder(path: str | None = None) -> Path:
    """Make the folder of kept sets where it is missing; see that no stranger can write in it.

    Args:
        path: the user's; None is `dschat` in the user's own cache folder, closed to all others.

    Raises:
        UserError: it cannot be made, or its owner or others could change what trains.
    """
    is_own = path is None
    folder = own_folder() if path is None else Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if is_own else 0o775)
        if hasattr(os, "getuid"):
            _check_owner(folder, folder.stat(), is_own)
        if is_own:
            folder.chmod(0o700)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def own_folder() -> Path:
    """`dschat` in the cache folder of this user, who has one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return Path(base if os.path.isabs(base) else Path.home() / ".cache", "dschat")
    except RuntimeError as error:
        raise UserError("there is no home folder for cached data: give data_output_path") from error


def _check_owner(folder: Path, status: os.stat_result, is_own: bool) -> None:
    """Refuse a folder in which another user could write rows.

    A folder that its owner opened to a group of this user is one that the group shares.
    """
    mode, shared = status.st_mode, False
    if not is_own and mode & stat.S_IWGRP:
        shared = status.st_gid in (os.getegid(), *os.getgroups())
    problem = None
    if status.st_uid not in (os.getuid(), 0) and not shared:
        problem = f"belongs to another user ({status.st_uid})"
    elif mode & stat.S_IWOTH or (is_own and mode & stat.S_IWGRP):
        problem = f"may be written by others (mode {stat.S_IMODE(mode):04o})"
    if problem is not None:
        raise UserError(
            f"{folder}: {problem}, who could change the rows that train; give another "
            "data_output_path, such as a new folder"
        )


def written_once(root: Path, kind: str, key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder `root / kind / key`; `write(folder)` fills it unless it exists, intact.

    Other processes of this machine that want it wait for the first one, and take over when that is
    killed. A damaged one is said and made again. What killed writers left is removed. What is made
    is as open to others as `root` is.

    Raises:
        UserError: `root` cannot be written or locked, or its disk is full; nothing is left over.
    """
    target = root / kind / key
    if target.exists() and damage_of(target) is None:
        return target
    try:
        mode = stat.S_IMODE(root.stat().st_mode)
        for folder in (root / _LOCKS, root / kind):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                folder.chmod(mode)  # whatever the umask
        with _locked(root, kind, key):
            if target.exists():
                damage = damage_of(target)
                if damage is None:
                    return target
                print(printable(f"{target}: {damage}; it is made again"), flush=True)
                remove(target)
            _sweep(root, kind, key)
            part = root / kind / f"{key}.{uuid.uuid4().hex}{_PART}"
            _writing.add(target)
            try:
                part.mkdir(mode=0o700)
                write(part)
                _publish(part, target, mode)
            finally:
                _writing.discard(target)
                shutil.rmtree(part, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # libraries wrap the system's
        found = disk_error(error)
        if found is None:
            raise
        raise _unwritable(root, found) from error
    return target


def damage_of(folder: Path) -> str | None:
    """Describe how a set differs from the one that was published there; None where it does not."""
    try:
        record = json.loads(regular(folder / RECORD).read_text(encoding="utf-8"))
        key, digests = record["key"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{RECORD} is missing or damaged"
    if key != folder.name:
        return f"{RECORD} is of another set"
    try:
        found = _digests(folder)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except UserError as error:  # no file
        return str(error)
    if differing := sorted(found.keys() ^ digests.keys()):
        return f"{differing[0]} is {'not of it' if differing[0] in found else 'missing'}"
    damaged = [name for name in digests if found[name] != digests[name]]
    return f"{damaged[0]} is damaged" if damaged else None


def _publish(part: Path, target: Path, mode: int) -> None:
    """Record the digests and give the set its name, all of it on the disk before."""
    digests = _digests(part)
    record = {"key": target.name, "files": digests}
    (part / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name in (*digests, RECORD):
        (part / name).chmod(mode & 0o666)
        sync(part / name)
    part.chmod(mode)
    sync(part)
    part.rename(target)
    sync(target.parent)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of each file of a set by name, but for the record; several at a time."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if not p.is_dir()}
    files.pop(RECORD, None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing holds no lock
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def _locked(root: Path, kind: str, key: str, wait: bool = True) -> AcquireReturnProxy:
    """Take the lock of a set until the end of a `with`; who may write in `root` may take it.

    Raises:
        Timeout: another holds it, and this one does not wait.
    """
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666
    lock = FileLock(root / _LOCKS / f"{kind}-{key}", mode=mode)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise
        place = root / kind / key
        print(printable(f"{place}: another process writes it, waiting"), flush=True)
        return lock.acquire(poll_interval=0.1)


def _sweep(root: Path, kind: str, key: str) -> None:
    """Remove the unfinished files of processes that are gone: nobody holds their locks."""
    for part in (root / kind).glob(f"*{_PART}"):
        owner = part.name.split(".", 1)[0]
        with (
            suppress(Timeout, OSError),  # its writer is at work; this user may not remove it
            nullcontext() if owner == key else _locked(root, kind, owner, wait=False),
        ):
            remove(part)


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if is_full else "fix that"
    return UserError(
        f"{folder} cannot be written ({reason}): {remedy} or give another data_output_path"
    )


def _in_child() -> None:
    """End a process that was forked in the middle of writing with its parent.

    A worker would outlive a killed parent, waiting for work that does not come.
    """
    if _writing and sys.platform == "linux":
        _writing.clear()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


os.register_at_fork(after_in_child=_in_child)
