"""The preloaded library that counts a run's changes on disk and breaks it: compile, load, arm."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("interpose.c")
PRELOAD = "LD_PRELOAD"
# The actions of interpose.c, in its order.
ACTIONS = ("none", "kill", "torn", "error", "signal", "signal one rank")


@dataclass(frozen=True)
class Aim:
    """An action at the `at`-th call whose "operation path" matches a pattern of fnmatch.

    Attributes:
        value: the errno of `error`, or the number of a signal.
    """

    action: str = "none"
    pattern: str = "*"
    at: int = 1
    value: int = 0


def compiler() -> str | None:
    """Path of the system's C compiler, if there is one."""
    if sys.platform != "linux":
        return None
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def build(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "libinterpose.so"
    command = [compiler(), "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def restart_with_library() -> None:
    """Start this Python process over with the library preloaded, unless it is already.

    Its children that execute another program do without it.
    """
    if _loaded() is not None:
        os.environ.pop(PRELOAD, None)
        return
    library = build(Path(tempfile.mkdtemp(prefix="dschat-faults-")))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], preloaded(library))


def preloaded(library: Path) -> dict[str, str]:
    """This process's environment for a child that has the library."""
    return {**os.environ, PRELOAD: str(library)}


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    names = ctypes.CDLL(None)
    return names if hasattr(names, "faults_arm") else None


def arm(folder: Path, aim: Aim, trace: int = -1) -> None:
    """Count calls under a folder from now on, in this process and those that it forks.

    Args:
        trace: a descriptor, opened for appending, that takes a line a call; -1: none.
    """
    words = os.fsencode(folder.resolve()), aim.pattern.encode()
    action = ACTIONS.index(aim.action)
    if _loaded().faults_arm(*words, action, ctypes.c_long(aim.at), aim.value, trace):
        raise OSError("no shared memory for the counter")


def fired() -> bool:
    """Tell whether the call that was aimed at has come."""
    return bool(_loaded().faults_fired())


def counted() -> int:
    """Calls since `arm`."""
    _loaded().faults_count.restype = ctypes.c_long
    return _loaded().faults_count()
