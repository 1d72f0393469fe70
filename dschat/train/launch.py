"""Start a step under a launcher, so that signals reach its ranks and its exit code comes back.

    python -m dschat.train.launch --log output/training.log deepspeed main.py ...
    python -m dschat.train.launch torchrun --nproc_per_node 8 main.py ...

SIGTERM, SIGINT, SIGUSR1 and SIGHUP go to the ranks themselves: `torchrun` and `deepspeed` would
kill these 30 seconds later, end with a traceback, or die alone. A run that a signal stopped ends
with 75 under either. However this process ends, also by SIGKILL, nothing that it started stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from dschat.errors import UserError
from dschat.train import fork_server
from dschat.train.signals import BY_LAUNCHER, CODE_FILE, STOPPED
from dschat.utils.printable import WINDOW, last_line, printable

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Takes a group, then waits for a word; where its other end is gone without one, the group goes too.
GUARD = 'read -r group && { read -r word || kill -s KILL -- "-$group"; }'


def run(
    command: Sequence[str], log: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> int:
    """Run a command in a process group of its own; return its exit code, 128 + n after a signal n.

    Args:
        log: file that gets what it prints as well, at its end.

    Raises:
        UserError: there is no such program, or the log cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder, _guarded() as guard, _passing_on() as signals:
        code_file = Path(folder, "code")
        env = {**(os.environ if environ is None else environ), CODE_FILE: str(code_file)}
        if sys.stdout.isatty():  # the command sees a pipe, and fits its bars to the window by these
            env[WINDOW] = str(shutil.get_terminal_size().columns)
        process = (log is not None and fork_server.fork(command, env)) or _start(command, log, env)
        guard.hold(process.pid)
        signals.go_to(process.pid)
        with _copied(process.stdout, log):
            code = process.wait()
        if code_file.exists():
            told, *note = code_file.read_text().split()
            if note == [BY_LAUNCHER] and code and not signals.came:
                code = -signal.SIGTERM if code == STOPPED else code  # another rank's, that failed
            else:
                code = int(told)
    return 128 - code if code < 0 else code


def _start(
    command: Sequence[str], log: str | Path | None, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # of another group than the terminal's
            stdout=None if log is None else subprocess.PIPE,
            stderr=None if log is None else subprocess.STDOUT,
            env=env,
            process_group=0,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from error


class _Guard:
    """A process that ends a group of others when this process ends."""

    def __init__(self) -> None:
        command, pipe = ["sh", "-c", GUARD], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, start_new_session=True)
        self.group: int | None = None

    def hold(self, group: int) -> None:
        self.group = group
        assert self.process.stdin is not None
        self.process.stdin.write(f"{group}\n".encode())
        self.process.stdin.flush()


@contextlib.contextmanager
def _guarded() -> Iterator[_Guard]:
    """End process groups that the block names when it ends, and when this process does."""
    guard = _Guard()
    try:
        yield guard
    finally:
        if guard.group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.group, signal.SIGKILL)
        guard.process.communicate(b"" if guard.group is None else b"done\n")


class _Signals:
    """Signals on their way to a process that may not have started yet."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.waiting: list[int] = []
        self.came = False

    def handle(self, signum: int, frame: object) -> None:
        self.came = True
        if self.pid is None:
            self.waiting.append(signum)
        else:
            send(self.pid, signum)

    def go_to(self, pid: int) -> None:
        self.pid = pid
        for signum in self.waiting:
            send(pid, signum)


@contextlib.contextmanager
def _passing_on() -> Iterator[_Signals]:
    """Pass signals on; one that is ignored, as SIGHUP under nohup, stays so."""
    signals = _Signals()
    before = {name: signal.getsignal(name) for name in PASSED_ON}
    chosen = [name for name, handler in before.items() if handler != signal.SIG_IGN]
    for name in chosen:
        signal.signal(name, signals.handle)
    try:
        yield signals
    finally:
        for name in chosen:
            signal.signal(name, before[name])


def send(pid: int, signum: int) -> None:
    """Send a signal to the ranks below a process; to its group, where there are none.

    Ranks that `deepspeed` started by pdsh are other machines': it ends them at SIGTERM alone.
    """
    ranks = _ranks_below(pid)
    with contextlib.suppress(ProcessLookupError):
        if not ranks and _reaches_by_pdsh(pid):
            os.kill(pid, signal.SIGTERM)
        elif not ranks:
            os.killpg(pid, signum)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signum)


def _reaches_by_pdsh(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(child.name().startswith("pdsh") for child in psutil.Process(pid).children())
    return False


def _ranks_below(pid: int) -> list[psutil.Process]:
    """Find the processes that a launcher made ranks, without their own workers."""
    ranks: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "LOCAL_RANK" in process.environ() and process.ppid() not in ranks:
                    ranks[process.pid] = process
    return list(ranks.values())


@contextlib.contextmanager
def _copied(source: IO[bytes] | None, log: str | Path | None) -> Iterator[None]:
    """Copy what comes to standard output and to the log."""
    if source is None or log is None:
        yield
        return
    with open(log, "ab", buffering=0) as file:
        thread = threading.Thread(target=_copy, args=(source, file), daemon=True)
        thread.start()
        yield
        thread.join(timeout=10)  # what outlives the command may hold its output open


def _copy(source: IO[bytes], log: IO[bytes]) -> None:
    """Copy to both while they take it; where neither does, the command meets a closed pipe."""
    sys.stdout.flush()
    targets = [sys.stdout.fileno(), log.fileno()]
    while targets and (data := os.read(source.fileno(), 65536)):
        for target in [*targets]:
            try:
                _write(target, data)
            except OSError as error:  # nobody reads any more, or the disk is full
                targets.remove(target)
                if target == log.fileno():
                    last_line(printable(f"{log.name}: {error.strerror}; it ends here", keep=""))
    source.close()


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


def main() -> None:
    """Run the command that stands after the options."""
    words, log = sys.argv[1:], None
    if words[:1] == ["--log"]:
        log, words = words[1], words[2:]
    if not words:
        sys.exit((__doc__ or "").strip())
    try:
        sys.exit(run(words, log))
    except UserError as error:
        print(printable(f"error: {error}", keep=""), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
