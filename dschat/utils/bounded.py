"""A limit to what a program from outside may take, such as a chat template or a pattern."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dschat.utils.last_resort import LastResort

_EVERY = 0.05  # seconds of this process's CPU time between two looks
_AGAIN = 1.0  # seconds until a block that has caught the error gets it once more
_HARD = 3  # times the limit: one operation that never comes back ends the process


class TooMuchError(BaseException):
    """The limit is passed; no `except Exception` of the program keeps it from ending."""


@contextlib.contextmanager
def bounded(seconds: float, size: float, problem: str) -> Iterator[None]:
    """Limit the block's CPU time, and by how much the process may grow in it.

    It is stopped between two operations of Python, and in one that asks for more memory than that.
    A single operation that holds the interpreter for three times as long ends the process, with
    code 2 and a line. Signals come to a process's main thread, so in other threads nothing is
    limited.

    Args:
        size: bytes. problem: what does not end, and the remedy, for that line.

    Raises:
        TooMuchError: with what it took.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began, peak = time.thread_time(), peak_resident()
    is_on, due = True, began

    def look(signum: int, frame: FrameType | None) -> None:
        nonlocal due
        now = time.thread_time()
        if not is_on or now < due:
            return
        due = now + _AGAIN  # not amid what the first one unwinds, which is to put all back
        if now - began > seconds:
            raise TooMuchError(f"more than {seconds:g} s")
        if peak_resident() - peak > size:
            raise _too_large(size)
        due = now

    before = signal.signal(signal.SIGVTALRM, look)
    try:
        with LastResort(_HARD * seconds, problem), _Room(size):
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, _EVERY, _EVERY)
                yield
            finally:
                is_on = False
    except MemoryError as error:
        raise _too_large(size) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _too_large(size: float) -> TooMuchError:
    return TooMuchError(f"more than {size / 1e9:g} GB of memory")


class _Room:
    """Have the system refuse this process more than so many bytes in a block."""

    def __init__(self, size: float):
        self._size, self._before = int(size), resource.getrlimit(resource.RLIMIT_AS)

    def __enter__(self) -> None:
        if not _statm:
            _statm.append(os.open("/proc/self/statm", os.O_RDONLY) if _IS_LINUX else -1)
        if _statm[0] < 0:
            return
        room = int(os.pread(_statm[0], 64, 0).split()[0]) * resource.getpagesize() + self._size
        soft, hard = self._before
        is_less = soft == resource.RLIM_INFINITY or room < soft
        resource.setrlimit(resource.RLIMIT_AS, (room if is_less else soft, hard))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


_IS_LINUX = sys.platform == "linux"
_statm: list[int] = []  # descriptor of a file that says how much this process has mapped
os.register_at_fork(after_in_child=_statm.clear)  # where it would still speak of the parent


def peak_resident() -> int:
    """Most bytes that the process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
