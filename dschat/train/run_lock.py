"""One run at a time holds an output folder, by a lock that names its process and host.

The lock is the operating system's, on OUTPUT/.lock: it ends with its process, however that ends,
and disks that several hosts share pass it on. The file is removed with the run's end; one that a
killed run has left keeps nobody out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dschat.errors import UserError

NAME = ".lock"

_held: dict[Path, IO[str]] = {}


def hold(output_dir: str | Path) -> None:
    """Hold the folder until `release`, or until this process ends; call it on one rank.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    path = Path(output_dir).resolve() / NAME
    if path in _held:
        return
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"output_dir {output_dir}: {path} is no file; remove it")
    try:
        file = _locked(path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except BlockingIOError as error:
        with path.open(encoding="utf-8") as other:
            holder = other.read().strip() or "another process"
        raise UserError(
            f"output_dir {output_dir}: {holder} writes there; wait for its end, stop it, or give "
            "another output_dir"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            print(
                f"output_dir {output_dir}: its disk has no locks ({error.strerror}); see to it "
                "that no other run writes there",
                flush=True,
            )
            return
        raise UserError(
            f"output_dir {output_dir}: {error.strerror}; give a writable one"
        ) from error
    _held[path] = file


def _locked(path: Path) -> IO[str]:
    """Open and lock the file; not one that its holder has removed in between."""
    while True:
        file = open(path, "a+", encoding="utf-8", opener=_no_link)  # noqa: SIM115
        try:
            # A lock of the process: workers that it forks do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # the other way to say it
            file.close()
            raise BlockingIOError(*error.args) from error
        except OSError:
            file.close()
            raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _no_link(path: str, flags: int) -> int:
    """Open the file itself: what a link leads to would be emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def release(output_dir: str | Path | None = None) -> None:
    """Release this folder, or all that this process holds."""
    chosen = None if output_dir is None else Path(output_dir).resolve() / NAME
    for path in [path for path in _held if chosen in (None, path)]:
        with contextlib.suppress(OSError):  # a disk gone read-only: the file stays, locking nothing
            path.unlink(missing_ok=True)
        _held.pop(path).close()


def held() -> list[Path]:
    """List the folders that this process holds."""
    return [path.parent for path in _held]


@contextlib.contextmanager
def released_after(output_dir: str | Path) -> Iterator[None]:
    """Release the folder at the end of the block, if the block took it."""
    try:
        yield
    finally:
        release(output_dir)
