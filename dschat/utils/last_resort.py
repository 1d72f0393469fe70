"""The end of a process whose interpreter is held by one operation that does not come back.

Comparing two nested lists that share their parts may take longer than the universe has, and looks
for no signal meanwhile; no thread of Python runs either. Timers of the C library need no
interpreter: one calls `system`, which prints a line, and a second one `_exit`. They count the CPU
time of the main thread, so a process that was stopped, or waits, is safe.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from typing import Any

CODE = 2  # of bad input
_LATER = 1.0  # seconds of CPU time from the line to the end
_CPU_OF_THREAD = 3  # CLOCK_THREAD_CPUTIME_ID
_BY_THREAD = 2  # SIGEV_THREAD


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("how", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 40),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: interval and first time, in seconds and nanoseconds."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "after", "after_ns"))


class _Timers:
    """Timers of this process that say what took too long, and end it."""

    def __init__(self, line: str):
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._settime = self._libc.timer_settime
        self.command = f"printf '\\n%s\\n' {shlex.quote(line)} >&2".encode()
        self._text = ctypes.c_char_p(self.command)
        text = ctypes.cast(self._text, ctypes.c_void_p).value
        self._timers = [self._made("system", text), self._made("_exit", CODE)]
        self._never = [ctypes.byref(_Times()) for _ in self._timers]
        self._after: dict[float, list[Any]] = {}

    def _made(self, function: str, value: int | None) -> ctypes.c_void_p:
        address = ctypes.cast(getattr(self._libc, function), ctypes.c_void_p).value
        event, timer = _Event(value, 0, _BY_THREAD, address), ctypes.c_void_p()
        if self._libc.timer_create(_CPU_OF_THREAD, ctypes.byref(event), ctypes.byref(timer)):
            raise OSError(ctypes.get_errno(), "timer_create")
        return timer

    def start(self, seconds: float) -> None:
        """Let them come after so many seconds of CPU time."""
        if seconds not in self._after:
            parts = [divmod(end, 1) for end in (seconds, seconds + _LATER)]
            times = [_Times(0, 0, int(whole), int(1e9 * part)) for whole, part in parts]
            self._after[seconds] = [ctypes.byref(each) for each in times]
        for timer, times in zip(self._timers, self._after[seconds], strict=True):
            self._settime(timer, 0, times, None)

    def stop(self) -> None:
        """Let them never come."""
        for timer, times in zip(self._timers, self._never, strict=True):
            self._settime(timer, 0, times, None)


_made: dict[str, _Timers | None] = {}  # by what they say
os.register_at_fork(after_in_child=_made.clear)  # which has none of its parent's timers


def _timers(problem: str) -> _Timers | None:
    if problem not in _made:
        try:
            _made[problem] = _Timers(f"error: {problem}") if sys.platform == "linux" else None
        except (OSError, AttributeError):  # another C library
            _made[problem] = None
    return _made[problem]


class LastResort:
    """End the process, with `error: PROBLEM` and code 2, if the block takes so much CPU time.

    Use it in the main thread. Where the system has no such timers nothing ends.
    """

    def __init__(self, seconds: float, problem: str):
        self._seconds, self._timers = seconds, _timers(problem)

    def __enter__(self) -> None:
        if self._timers is not None:
            self._timers.start(self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._timers is not None:
            self._timers.stop()
