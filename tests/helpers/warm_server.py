"""A process that has imported what programs import, and is forked for each that a test starts.

Started by `warm.py` with the name of a socket and the process whose end ends it. A fork leaves
`serve` where a fresh interpreter would stand after these imports, is the program, and ends as the
interpreter does. Each has a connection of its own: a request and its standard output and error come
in, its process id and its exit code go out.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys

IMPORTED = {
    "datasets": (),
    "deepspeed": (),
    "matplotlib.pyplot": (),
    "torch.utils.tensorboard": (),
    "transformers": ("LlamaForCausalLM", "LlamaForSequenceClassification", "get_scheduler"),
    "dschat.config": ("SFTSettings",),
    "dschat.rlhf.ppo_trainer": (),
    "dschat.train.prepare": (),
}


def import_all() -> dict[str, str]:
    """Import what takes seconds; nothing is computed. Return the variables that this has set."""
    before = dict(os.environ)
    for name, attributes in IMPORTED.items():
        module = importlib.import_module(name)
        for attribute in attributes:
            getattr(module, attribute)
    gc.collect()
    gc.freeze()  # what forks share is not written to by their collections
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def is_ours(connection: socket.socket) -> bool:
    """Tell whether the same user is at the other end."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", peer)[1] == os.getuid()


def serve(listener: socket.socket, owner: int) -> tuple[dict, list[int]]:
    """Fork for each connection as long as `owner` lives; return in the process of a request."""
    life = os.pidfd_open(owner)
    while True:
        ready, _, _ = select.select([listener, life], [], [])
        if life in ready:
            os._exit(0)
        connection, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            os.close(life)
            return mind(connection)
        connection.close()


def mind(connection: socket.socket) -> tuple[dict, list[int]]:
    """Start what is asked for, wait for it and tell how it ended; return in its own process."""
    if not is_ours(connection):
        os._exit(1)
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    if (pid := os.fork()) == 0:
        connection.close()
        return json.loads(text), files
    with contextlib.suppress(BrokenPipeError):  # who asked has ended
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def become(request: dict, files: list[int], set_by_imports: dict[str, str]) -> None:
    """Be the program: its streams, folder, variables, command line and seed are its own."""
    import numpy as np

    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"] | set_by_imports)
    os.chdir(request["cwd"])
    np.random.seed()  # as it is at an import; Python's own is new after a fork
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind(f"\0{sys.argv[1]}")
        except OSError:  # another test process was faster
            sys.exit(0)
        server.listen(64)
        variables = import_all()
        become(*serve(server, int(sys.argv[2])), variables)
