"""A limit to what a program from outside may take, such as a chat template."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_EVERY = 0.05  # seconds of this process's CPU time between two looks


class TooMuchError(BaseException):
    """The limit is passed; no `except Exception` of the program keeps it from ending."""


@contextlib.contextmanager
def bounded(seconds: float, size: float) -> Iterator[None]:
    """Limit the block's CPU time, and by how much the process may grow in it.

    It is stopped between two operations of Python; a single one may exceed the limit. Signals come
    to a process's main thread, so in other threads nothing is limited.

    Args:
        size: bytes.

    Raises:
        TooMuchError: with what it took.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began, peak = time.thread_time(), peak_resident()
    is_on = True

    def look(signum: int, frame: FrameType | None) -> None:
        if is_on and time.thread_time() - began > seconds:
            raise TooMuchError(f"more than {seconds:g} s")
        if is_on and peak_resident() - peak > size:
            raise TooMuchError(f"more than {size / 1e9:g} GB of memory")

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, _EVERY, _EVERY)
    try:
        yield
    finally:
        is_on = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak_resident() -> int:
    """Most bytes that the process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
