"""A fork server: it imports once what the steps import, and each step starts as a fork of it.

A pipeline on the CPU starts one, and its steps save the seconds that importing torch, transformers
and DeepSpeed takes. `launch.run` asks the server whose socket is in the environment; a program that
is none of its own, or is to have another environment, starts as usual. So does all where torch is
of a build for GPUs: a process that has asked a driver for its devices cannot be forked.

1. `running`: a pipeline's server, for as long as the block takes
2. `fork`: ask it for a step
3. `main`: the server; in a fork of it, the step
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from dschat.lazy import torch
from dschat.train.signals import CODE_FILE
from dschat.utils.printable import VERBOSE, WINDOW, guard_terminal
from dschat.utils.run_file import run_file

SOCKET = "DSCHAT_FORK_SERVER"  # variable with the path of the server's socket
# Variables that no import reads, on a CPU: a step may have others than the server.
FREE = {SOCKET, CODE_FILE, WINDOW, "PYTORCH_CUDA_ALLOC_CONF", "PATH"}
FREE |= {"PWD", "OLDPWD", "SHLVL", "PS1", "_"}  # a shell's


class Step:
    """A forked step, as `launch.run` would hold its process.

    Attributes:
        pid: of the step, and of the group that it leads.
        stdout: what it prints, on standard output and error.
    """

    def __init__(self, pid: int, stdout: IO[bytes], answers: IO[str]):
        self.pid, self.stdout, self._answers = pid, stdout, answers

    def wait(self) -> int:
        """Return its exit code, -n where signal n ended it; -9 also where the server was lost."""
        with self._answers:
            return int(self._answers.readline() or -9)


@contextlib.contextmanager
def running(modules: Sequence[str], files: Sequence[str | Path] = ()) -> Iterator[None]:
    """Have a server in the environment while the block runs; it ends with this process at latest.

    Args:
        modules: that it imports. files: programs that it may start, besides `python -m dschat`.
    """
    with contextlib.ExitStack() as ends:
        with contextlib.suppress(OSError):  # no room for a socket: all steps start as usual
            folder = ends.enter_context(tempfile.TemporaryDirectory())
            os.environ[SOCKET] = _start(f"{folder}/steps", [*modules, "--", *map(str, files)], ends)
            ends.callback(os.environ.pop, SOCKET)
        yield


def _start(path: str, words: Sequence[str], ends: contextlib.ExitStack) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", "dschat.train.fork_server", str(listener.fileno()), *words],
            stdin=subprocess.PIPE,  # it ends where nobody holds the other end
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ),  # without what libraries set in C alone
            pass_fds=[listener.fileno()],
            process_group=0,  # of another group than the terminal's
        )
    ends.enter_context(server)
    ends.callback(server.kill)
    return path


def fork(command: Sequence[str], environ: Mapping[str, str]) -> Step | None:
    """Start a command as a fork of the server; None where it is to start as usual.

    Args:
        environ: the step's environment.
    """
    program, path = shutil.which(command[0], path=environ.get("PATH")), environ.get(SOCKET)
    if path is None or program is None or VERBOSE in command:
        return None
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX) as connection, tempfile.TemporaryFile("w+") as request:
        json.dump([program, command[1:], dict(environ), os.getcwd()], request)
        request.flush()
        answers = connection.makefile("r")
        try:
            connection.connect(path)
            socket.send_fds(connection, [b"1"], [request.fileno(), writer])
            pid = answers.readline()
        except OSError:  # its process has ended
            pid = ""
    os.close(writer)
    if not pid:
        answers.close()
        os.close(reader)
        return None
    return Step(int(pid), os.fdopen(reader, "rb", buffering=0), answers)


def main() -> None:
    """Import, then fork a step for each that asks, until the pipeline has gone."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    end = sys.argv.index("--")
    modules, files = sys.argv[2:end], sys.argv[end + 1 :]
    before = dict(os.environ)
    gc.disable()  # a fifth of the time of imports
    guard_terminal()
    if any(getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")):
        return  # asking for the devices would wake a driver
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # steps share these pages for as long as nothing writes to them
    gc.enable()
    made = {name: value for name, value in os.environ.items() if before.get(name) != value}
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            is_step = _serve(connection, files, before, made)
        if is_step:
            listener.close()
            _run(sys.argv)
            return


def _serve(
    connection: socket.socket,
    files: Sequence[str],
    before: Mapping[str, str],
    made: Mapping[str, str],
) -> bool:
    """Fork the step that is asked for, tell its pid and its end; returns True in the step.

    Args:
        before: this process's environment at its start. made: what imports have added.
    """
    _, fds, _, _ = socket.recv_fds(connection, 1, 2)
    if len(fds) != 2:  # who asked has gone
        return False
    request_fd, output = fds
    with os.fdopen(request_fd, "r") as request:
        request.seek(0)
        python, words, environ, folder = json.load(request)
    is_own = words[:2] == ["-m", "dschat"] or words[0] in files
    free = FREE | made.keys()
    fixed = [{name: env[name] for name in env.keys() - free} for env in (before, environ)]
    if not is_own or not _is_this(python) or fixed[0] != fixed[1]:
        os.close(output)
        return False
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(output)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ | made)
        sys.argv = words
        return True
    os.close(output)
    with contextlib.suppress(OSError):  # the step was faster
        os.setpgid(pid, pid)
    with contextlib.suppress(OSError):  # who asked has gone, and its guard ends the step
        connection.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    return False


def _run(words: list[str]) -> None:
    """Run what `python WORDS` runs, in this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = os.path.dirname(words[0])
    run_file(words[0])


def _is_this(python: str) -> bool:
    """Return whether a path is this interpreter, in the same environment."""
    return Path(python).parent == Path(sys.executable).parent and Path(python).samefile(
        sys.executable
    )


if __name__ == "__main__":
    main()
