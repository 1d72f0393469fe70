"""CPU time of this process's own work: while it grows, the process is not stuck."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil


def cpu_time() -> int:
    """Nanoseconds that this process's work has run; where the system does not tell, the clock.

    Work is what the main thread does, other threads that the process would wait for, and processes
    below it. Daemon threads are left out: they wake now and then, whatever the others do. A thread
    that waits for a disk runs for a moment whenever a part of what it waits for is done.
    """
    main = pid = os.getpid()  # which is the main thread's number, also after a fork
    others = {t.native_id for t in threading.enumerate() if not t.daemon and t.native_id} - {main}
    if not (ran := _ran(pid, main)):
        return time.monotonic_ns()
    ran += sum(_ran(pid, thread) for thread in others)
    return ran + sum(_ran_below(child.pid) for child in psutil.Process().children(recursive=True))


def _ran_below(pid: int) -> int:
    try:
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has just ended
        return 0
    return sum(_ran(pid, thread) for thread in threads)


def _ran(pid: int, thread: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
