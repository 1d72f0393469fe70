"""Start a program on one or more ranks, all forked from this process, in a process group.

The group's leader starts the ranks and is in the group itself, so a kill of the group leaves no
rank to be started after it. No rank begins before all are there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import library
from tests.faults.library import Aim
from tests.helpers.steps import free_port
from tests.helpers.steps_worker import run

SIGNALS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
LINGER = 20.0  # seconds in which what a run has started must be gone once its ranks are


@dataclass(frozen=True)
class Pause:
    """A moment: so many seconds after the trace has so many bytes."""

    trace_bytes: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        codes: of each rank as `waitstatus_to_exitcode` gives it; all -9 where the group was killed.
        fired: the call that was aimed at came. calls: counted ones. hung: the time limit ended it.
        left: processes of it outlived its ranks, and were killed.
    """

    codes: tuple[int, ...]
    stdout: str
    stderr: str
    seconds: float
    fired: bool = False
    calls: int = 0
    hung: bool = False
    left: bool = False

    @property
    def killed(self) -> bool:
        """Tell whether SIGKILL ended the whole group."""
        return set(self.codes) == {-signal.SIGKILL} and not self.hung


def start(
    argv: Sequence[str],
    folder: Path,
    logs: Path,
    *,
    ranks: int = 1,
    aim: Aim | None = None,
    kill_after: Pause | None = None,
    limit: float = 900.0,
    trace: Path | None = None,
) -> Outcome:
    """Run a program of the repository in `folder` to its end, and say what came of it.

    Args:
        logs: an existing folder outside `folder`, for what the ranks print.
        kill_after: when to kill it by the clock.
        limit: seconds after which the run is killed as hung.
        trace: gets a line for each counted call.
    """
    reading, writing = os.pipe()
    began = time.perf_counter()
    leader = os.fork()
    if leader == 0:
        os.close(reading)
        _never_return(lambda: _lead(argv, folder, logs, ranks, aim, trace))
    os.close(writing)
    with contextlib.suppress(OSError):  # the leader does so as well; whoever comes first
        os.setpgid(leader, leader)
    hung = left = False
    deadline = time.monotonic() + limit
    if kill_after is not None:
        while not _ends_within(reading, 0.005) and _size(trace) < kill_after.trace_bytes:
            pass
        if not _ends_within(reading, kill_after.seconds):
            _kill_group(leader)
    status = _wait(leader, deadline)
    if status is None:
        hung = True
        _kill_group(leader)
        status = os.waitpid(leader, 0)[1]
    if not _ends_within(reading, LINGER):
        left = True
        _kill_group(leader)
        _ends_within(reading, LINGER)
    os.close(reading)
    report = {"codes": [os.waitstatus_to_exitcode(status)] * ranks, "fired": True, "calls": 0}
    if os.waitstatus_to_exitcode(status) == 0:
        report = json.loads((logs / "report.json").read_text())
    texts = [
        "".join((logs / f"{name}.{rank}").read_text(errors="replace") for rank in range(ranks))
        if (logs / f"{name}.{ranks - 1}").exists()
        else ""
        for name in ("out", "err")
    ]
    seconds = time.perf_counter() - began
    codes = tuple(report["codes"])
    return Outcome(codes, *texts, seconds, report["fired"], report["calls"], hung, left)


def _never_return(work: Callable[[], None]) -> None:
    """Do the work of a forked process, which must not come back into its parent's code."""
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def _lead(
    argv: Sequence[str],
    folder: Path,
    logs: Path,
    ranks: int,
    aim: Aim | None,
    trace: Path | None,
) -> None:
    """Start the ranks, release them together, wait for all, and report."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    file = -1
    if trace is not None:
        file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    library.arm(folder, aim or Aim(), file)
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = free_port()
    ready, go = os.pipe(), os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_rank(argv, folder, logs, rank, ready[1], go)
        pids.append(pid)
    for _ in pids:
        os.read(ready[0], 1)
    (logs / "ready").write_text(" ".join(map(str, pids)))
    os.close(go[0])
    os.close(go[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    report = {"codes": codes, "fired": library.fired(), "calls": library.counted()}
    (logs / "report.json").write_text(json.dumps(report))


def _be_rank(
    argv: Sequence[str], folder: Path, logs: Path, rank: int, ready: int, go: tuple[int, int]
) -> None:
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(logs / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(folder)
    os.close(go[1])
    os.write(ready, b"x")
    os.read(go[0], 1)  # comes back when the leader closes it
    code = 70
    try:
        code = run(list(argv))
        threading._shutdown()
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        import traceback

        traceback.print_exc()
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _ends_within(pipe: int, seconds: float) -> bool:
    """Tell whether every process that holds the pipe's other end is gone in time."""
    return bool(select.select([pipe], [], [], seconds)[0])


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _wait(pid: int, deadline: float) -> int | None:
    """Wait for a child; None at the deadline."""
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    return None
