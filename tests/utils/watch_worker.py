"""Runs whose ranks die, stop, hang or never come, all at a time; each rank is a fork of this one.

Started with one argument, a folder: `results.json` there maps each case to every rank's exit code
(null where it was stopped) and standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed

from dschat.config.cli import run_cli
from dschat.errors import UserError
from dschat.train import checkpoint_write, run_lock, signals
from dschat.utils import places, rank_watch
from dschat.utils.distributed import all_reduce_sum, barrier, from_main, init_distributed
from dschat.utils.waiting import from_waiting_main
from tests.helpers.steps import free_port

HEAVY = deepspeed  # imported once
LIMIT = 15  # seconds; thirty processes start at once, and connect within it


def send(signum: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), signum)


def work(seconds: float) -> None:
    """Do a little now and then, as on a slow disk."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)


def stick() -> str:
    """Wait in the system for what never comes, as on a disk that hangs."""
    return str(os.read(os.pipe()[0], 1))


def write_file(name: str) -> None:
    """Write a file of a checkpoint, which cannot even be opened while nobody reads it."""
    path = Path(tempfile.mkdtemp(), name)
    os.mkfifo(path)
    checkpoint_write._save({}, path)


def killed_in_release() -> None:
    """Die as the last thing that the run does: it lets go of its output folder."""
    run_lock.release = KILL


def refuse(rank: int) -> Callable[[], object]:
    """Meet an error of which the other ranks know nothing."""

    def act() -> None:
        raise UserError(f"a reason of rank {rank}")

    return act


def ended_beside() -> None:
    """Be sent a launcher's signal as soon as another rank has told why it ends."""
    watch = rank_watch._watch
    while not watch._store.check([watch._last]):
        time.sleep(0.001)
    signalled()


def signalled() -> None:
    """Be sent a signal, as the only rank, before the first step."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)


KILL, STOP, HANG = send(signal.SIGKILL), send(signal.SIGSTOP), lambda: time.sleep(3600)
# Name → what each rank does in step 4, in its order; None: it never starts.
CASES: dict[str, list[Callable[[], object] | None]] = {
    "fine": [print, print],
    "killed": [print, KILL],
    "first killed": [KILL, print],
    "one of three killed": [print, print, KILL],
    "killed at the end": [killed_in_release, print],
    "stopped": [print, STOP],
    "first stopped": [STOP, print],
    "hangs": [print, HANG],
    "one of three hangs": [print, HANG, print],
    "long work of rank 0": [lambda: from_main(lambda: work(1.5 * LIMIT))] * 2,
    "stuck in work of rank 0": [lambda: from_main(stick)] * 2,
    "stuck in other work of rank 0": [lambda: from_waiting_main(stick)] * 2,
    "stuck on a file": [lambda: write_file("fifo"), print],
    "stopped in work of rank 0": [lambda: from_main(STOP)] * 2,
    "own error": [refuse(0), print],
    "own error of another": [print, print, refuse(2)],
    "own error, then the launcher": [ended_beside, refuse(1)],
    "one signalled": [print, signalled],
    "first signalled": [signalled, print],
    "never comes": [print, None],
    "first never comes": [None, print],
}


def child(case: str, rank: int, port: str, folder: Path) -> None:
    """Be one rank; never returns."""
    os.dup2(os.open(folder / f"{case}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    ranks = str(len(CASES[case]))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    signals.start()

    def main() -> None:
        init_distributed(LIMIT)
        barrier()
        places.in_step(4)
        act = CASES[case][rank]
        assert act is not None
        act()
        all_reduce_sum([1.0])

    code: object = 0
    try:
        run_cli(main)
    except SystemExit as stop:
        code = stop.code
    os._exit(int(str(code)))


def main() -> None:
    """Fork them all, and wait for all but those that were stopped."""
    folder = Path(sys.argv[1])
    pids: dict[int, tuple[str, int]] = {}
    for case, acts in CASES.items():
        port = free_port()
        for rank, act in enumerate(acts):
            if act is not None:
                pid = os.fork()
                if pid == 0:
                    child(case, rank, port, folder)
                pids[pid] = case, rank
    results: dict[str, dict[int, tuple[int | None, str]]] = {case: {} for case in CASES}
    stopped = []
    for pid, (case, rank) in pids.items():
        _, status = os.waitpid(pid, os.WUNTRACED)
        code = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if code is None:
            stopped.append(pid)
        results[case][rank] = code, (folder / f"{case}.{rank}").read_text()
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
