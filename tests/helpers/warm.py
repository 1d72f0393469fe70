"""Start a Python script as a fork of a process that has imported torch, DeepSpeed and the rest.

It takes a tenth of a second in place of ten. What is forked (`warm_server.py`) has computed nothing
and is shared by all test processes of a run. There are two, with hash seeds of their own: ranks go
through a set of strings in differing orders, as fresh processes do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.helpers.warm_server import is_ours

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("warm_server.py")
SERVERS = 2
# All other variables, which packages may read when they are imported, are the server's own, or else
# a process is a fresh one.
OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Those that packages, and dschat for torch, set themselves in a process that imports them.
SET_BY_IMPORTS = (
    *("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "TORCH_CPP_LOG_LEVEL"),
    *("GRADIO_ANALYTICS_ENABLED", "PLAT"),
)


def shared(env: Mapping[str, str]) -> dict[str, str]:
    """Leave out a single process's own variables, and what packages make of the others."""
    left_out = (*OWN, *SET_BY_IMPORTS)
    return {k: v for k, v in env.items() if k not in left_out and not k.startswith("PYTEST_")}


# Before any test: what a test sets is in no server that others use.
VARIABLES = shared(os.environ) | {"PYTHONPATH": str(ROOT)}


class Forked:
    """A process that a server has started, as far as tests use `subprocess.Popen`."""

    def __init__(self, connection: socket.socket):
        self.returncode: int | None = None
        self._connection = connection
        self._told = b""  # process id and exit code, a line each

    def _lines(self, count: int, timeout: float | None) -> list[bytes] | None:
        """What the server has told, once that are so many lines; None if they take longer."""
        while self._told.count(b"\n") < count:
            if not select.select([self._connection], [], [], timeout)[0]:
                return None
            if not (more := self._connection.recv(64)):
                raise RuntimeError("a warm server has ended; what it said is in the test's output")
            self._told += more
        return self._told.split(b"\n")

    @property
    def pid(self) -> int:
        """Its id, as soon as it is started."""
        lines = self._lines(1, None)
        assert lines
        return int(lines[0])

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as it runs."""
        if self.returncode is None and (lines := self._lines(2, 0)):
            self.returncode = int(lines[1])
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; raises subprocess.TimeoutExpired after the seconds."""
        if self.returncode is None and self._lines(2, timeout) is None:
            raise subprocess.TimeoutExpired("a warm process", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


Process = Forked | subprocess.Popen


def start(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdout: IO,
    stderr: IO,
    number: int = 0,
) -> Process:
    """Start `python ARGV...`, the script first, warm where that is the same.

    Args:
        env: all of its variables. number: processes with other numbers have other hash seeds.
    """
    if not sys.platform.startswith("linux") or shared(env) != VARIABLES:
        return subprocess.Popen(
            [sys.executable, *argv],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    request = {"argv": argv, "cwd": str(cwd), "env": dict(env)}
    connection = connected(number % SERVERS)
    files = [stdout.fileno(), stderr.fileno()]
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], files)
    return Forked(connection)


def connected(number: int) -> socket.socket:
    """A connection to a server, which is started where there is none."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    digest = hashlib.sha256(json.dumps(sorted(VARIABLES.items())).encode()).hexdigest()
    name = f"dschat-tests-{owner}-{digest[:16]}-{number}"
    server: subprocess.Popen | None = None
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"\0{name}")
            assert is_ours(connection)
            return connection
        except ConnectionRefusedError:
            connection.close()
        if server is None:  # another test process may start one too, and one of them ends with 0
            server = subprocess.Popen(
                [sys.executable, str(SERVER), name, str(owner)],
                env=VARIABLES,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        if server.poll():
            raise RuntimeError(f"a warm server ended with {server.returncode}")
        time.sleep(0.02)
