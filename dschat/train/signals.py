"""Signals that stop a run: in its loop after the present step, elsewhere at once.

SIGTERM, SIGINT, SIGHUP and SIGUSR1, a scheduler's warning, reach a thread, which answers also while
the main thread waits inside a library. Only `start` installs anything; programs call it, no library
code does.

1. `start`: from here a signal ends the process at once, with one line
2. `finish_steps`: from here the first signal is noted and a second one ends the process
3. `requested`: asked after each step, by a loop that then saves and raises `Stopped`
4. `restore`: handlers as they were
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.utils.launchers import is_one_of_several, rank_of
from dschat.utils.printable import last_line

STOPPED = 75  # exit code of a stopped run; EX_TEMPFAIL of sysexits.h: start it again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
CODE_FILE = "DSCHAT_CODE_FILE"  # variable with the file in which `train.launch` looks for the code
BY_LAUNCHER = "SIGTERM"  # beside the code: perhaps a launcher's, because another rank has failed
ECHO = 1.0  # seconds in which a launcher may pass on the signal that the process has already
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Stopped(SystemExit):
    """A run has stopped between two steps; the process ends with code 75.

    Attributes:
        line: what happened, and how to go on.
    """

    def __init__(self, signum: int, step: int, saved: str | None):
        super().__init__(STOPPED)
        how = "streamed rows cannot be resumed, start from the beginning"
        if saved is not None:
            how = f"saved in {saved}, go on with the same command and --resume"
        self.line = f"stopped by {signal.Signals(signum).name} after step {step}: {how}"
        if "TORCHELASTIC_RUN_ID" in os.environ and CODE_FILE not in os.environ:
            self.line += (
                "; torchrun adds a report and ends with 1, under `python -m dschat.train.launch` "
                f"with {STOPPED}"
            )


@dataclass
class _Watch:
    """Handlers that were replaced, the pipe that signals are written to, and what has come."""

    replaced: dict[signal.Signals, Any] = field(default_factory=dict)
    wakeup: int = -1
    pipe: tuple[int, int] = (-1, -1)
    thread: threading.Thread | None = None
    finishes_steps: bool = False
    first: int = 0
    first_at: float = 0.0


_watch = _Watch()


def start() -> None:
    """Watch for signals; does nothing outside the main thread, where no handler can be set."""
    if threading.current_thread() is not threading.main_thread():
        return
    restore()
    _watch.pipe = os.pipe()
    os.set_blocking(_watch.pipe[1], False)
    _watch.thread = threading.Thread(target=_attend, args=(_watch.pipe[0],), daemon=True)
    _watch.thread.start()
    _watch.wakeup = signal.set_wakeup_fd(_watch.pipe[1], warn_on_full_buffer=False)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    chosen = [name for name in STOP_SIGNALS if not (ignored and name == signal.SIGHUP)]
    _watch.replaced = {name: signal.signal(name, _nothing) for name in chosen}
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # the launcher


def restore() -> None:
    """Put back the handlers that `start` found."""
    global _watch
    if _watch.thread is None or threading.current_thread() is not threading.main_thread():
        return
    for name, handler in _watch.replaced.items():
        signal.signal(name, handler)
    signal.set_wakeup_fd(_watch.wakeup)
    os.write(_watch.pipe[1], b"\0")
    _watch.thread.join()
    for end in _watch.pipe:
        os.close(end)
    _watch = _Watch()


def finish_steps() -> None:
    """Leave the first signal to the loop: it calls `requested` after each step."""
    _watch.finishes_steps = True


def requested() -> int:
    """Return the signal that asks for a stop, or 0."""
    return _watch.first


def ignore_at_exit() -> None:
    """Let the process end with its own code when launchers signal what ended first elsewhere."""
    atexit.register(lambda: [signal.signal(name, signal.SIG_IGN) for name in STOP_SIGNALS])


def _nothing(signum: int, frame: object) -> None:
    """Handle a signal: the interpreter has written its number to the pipe."""


def _attend(reader: int) -> None:
    while number := os.read(reader, 1)[0]:
        if number in STOP_SIGNALS:
            _note(number)


def _note(signum: int) -> None:
    name, now = signal.Signals(signum).name, time.monotonic()
    if not _watch.first:
        _watch.first_at, _watch.first = now, signum
        if not _watch.finishes_steps:
            _end_early(name)
    elif now - _watch.first_at > ECHO:
        line = f"ended by a second signal, {name}: what was done since the last checkpoint is lost"
        _end(line, 128 + signum)


def _end_early(name: str) -> None:
    """End before the first step; launchers, too, send SIGTERM, to ranks beside one that failed."""
    line, is_launchers = f"stopped by {name} before the first step", name == BY_LAUNCHER
    if is_launchers and is_one_of_several(os.environ):
        line += ", as launchers end the ranks beside one that fails; where none has failed,"
    else:
        line += ";"
    watch = sys.modules.get("dschat.utils.rank_watch")
    if watch is not None:
        watch.heed()  # which ends this process by the failed rank's line and code
    _end(f"{line} start the same command again", STOPPED, BY_LAUNCHER if is_launchers else "")


def _end(line: str, code: int, note: str = "") -> None:
    """Say a line on rank 0, and end the process from any thread, and with it the other ranks."""
    if rank_of(os.environ) == 0:
        last_line(line)
    own_code, watch = report_exit(code, note), sys.modules.get("dschat.utils.rank_watch")
    if watch is not None and code == STOPPED:  # a second signal waits for nobody
        watch.tell(line, own_code)
    os._exit(own_code)


def report_exit(code: int, note: str = "") -> int:
    """Tell `train.launch` the exit code, and BY_LAUNCHER or nothing; return the one to end with.

    To torchrun any other than 0 is a failure, to be reported and, by `--max-restarts`, undone.
    """
    path = os.environ.get(CODE_FILE)
    if path is None or not Path(path).parent.is_dir():  # that of a launcher on another machine
        return code
    Path(path).write_text(f"{code} {note}".strip())
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else code


# A worker is forked with signals blocked: one that came before the child has let go of the pipe
# would be taken for the run's.
def _before_fork() -> None:
    if _watch.thread is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _in_parent() -> None:
    if _watch.thread is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _in_child() -> None:
    """Leave signals of a forked worker to the system: they are not the run's."""
    global _watch
    if _watch.thread is None:
        return
    with contextlib.suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)
    _watch = _Watch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
