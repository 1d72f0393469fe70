"""Two "nodes" on this machine: network, host name, cache and one disk of their own.

They are namespaces where the user may make them (root on Linux), joined by one cable; elsewhere
they are processes with folders of their own, and share network and host name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launch import ROOT, TIME_LIMIT
from tests.helpers.steps import LAUNCHER_VARIABLES, free_port

# Arguments: the node's name, its disk, where it is mounted, its /etc/hosts; then a command.
ENTER = """
set -e
hostname "$1"; mount --bind "$2" "$3"; mount --bind "$4" /etc/hosts
shift 4; exec "$@"
"""
OWN_DISK = "OWN_DISK"  # variable of each node's processes
OF_A_SCHEDULER = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        local: its own disk, as its processes see it. disk: the same, as the test sees it.
        host: by which the other one reaches it. enter: command that runs another one there.
    """

    number: int
    local: Path
    disk: Path
    host: str
    enter: tuple[str, ...] = ()

    def start(
        self, command: Sequence[str], cwd: Path, log: Path, env: Mapping[str, str]
    ) -> subprocess.Popen:
        """Start a command there; what it prints goes to the end of a file."""
        known = (*LAUNCHER_VARIABLES, "DSCHAT_CODE_FILE")
        base = {
            name: value
            for name, value in os.environ.items()
            if name not in known and not name.startswith(OF_A_SCHEDULER)
        }
        own = {
            **{
                "HOME": str(self.local),
                OWN_DISK: str(self.local),
                "XDG_CACHE_HOME": str(self.local / "cache"),
            },
            **{"TMPDIR": str(self.local / "tmp"), "HF_HOME": str(self.local / "hf")},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
        }
        with log.open("a") as out:
            return subprocess.Popen(
                [*self.enter, *command],
                cwd=cwd,
                env={**base, **own, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Make them; everything below `folder` but their own disks is shared."""
    disks = [folder / f"disk-{number}" for number in range(2)]
    for disk in disks:
        for name in ("tmp", "cache"):
            (disk / name).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        names = _cabled(stack) if can_make_namespaces() else None
        if names is None:
            yield [Node(n, disk, disk, "127.0.0.1") for n, disk in enumerate(disks)]
            return
        local, hosts = folder / "local", folder / "hosts"
        local.mkdir()
        lines = [f"10.11.12.{n + 1} node-{n}" for n in range(2)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        yield [
            Node(n, local, disk, f"node-{n}", _enter(name, n, disk, local, hosts))
            for n, (name, disk) in enumerate(zip(names, disks, strict=True))
        ]


def can_make_namespaces() -> bool:
    """Tell whether this user may make nodes with a network of their own."""
    tools = all(shutil.which(name) for name in ("ip", "unshare", "mount", "hostname"))
    if not sys.platform.startswith("linux") or not tools or os.getuid() != 0:
        return False
    trial = [
        "unshare",
        "--net",
        "--mount",
        "--uts",
        "sh",
        "-c",
        "hostname x && mount -t tmpfs x /mnt",
    ]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def _cabled(stack: contextlib.ExitStack) -> list[str] | None:
    """Two network namespaces with a cable between them; None where there can be none."""
    names = [f"dschat-{os.getpid()}-{number}" for number in range(2)]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0

    for name in names:
        if not ip("netns", "add", name):
            return None
        stack.callback(ip, "netns", "delete", name)
    first, second = (("name", "cable", "netns", name) for name in names)
    done = ip("link", "add", *first, "type", "veth", "peer", *second)
    for number, name in enumerate(names):
        inside = ("-n", name)
        done &= ip(*inside, "address", "add", f"10.11.12.{number + 1}/24", "dev", "cable")
        done &= all(ip(*inside, "link", "set", link, "up") for link in ("lo", "cable"))
    return names if done else None


def _enter(name: str, number: int, disk: Path, local: Path, hosts: Path) -> tuple[str, ...]:
    unshare = ("ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh")
    return (*unshare, f"node-{number}", str(disk), str(local), str(hosts))


@dataclass(frozen=True)
class Job:
    """A command that both nodes run: one process each, or a launcher."""

    processes: tuple[subprocess.Popen, ...]

    def wait(self) -> list[int]:
        """Exit codes; the first that fails gives the other a minute, then it is killed."""
        deadline = time.monotonic() + TIME_LIMIT
        failed = None
        while any(process.poll() is None for process in self.processes):
            if failed is None and any(process.poll() for process in self.processes):
                failed = time.monotonic()
            if time.monotonic() > deadline or (failed and time.monotonic() > failed + 60):
                self.kill()
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """End all processes of both nodes, as a power failure would."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def by_torchrun(nodes: Sequence[Node], command: Sequence[str], cwd: Path, log: str) -> Job:
    """`torchrun --nnodes 2` on each node."""
    endpoint = f"{nodes[0].host}:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    return _started(nodes, [*torchrun, *command], cwd, log, lambda node: {})


def by_srun(nodes: Sequence[Node], command: Sequence[str], cwd: Path, log: str) -> Job:
    """Two tasks as `srun` starts them, one a node."""
    port = free_port()

    def variables(node: Node) -> dict[str, str]:
        return {
            **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
            **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"},
            **{"SLURM_PROCID": str(node.number), "SLURM_NODEID": str(node.number)},
            **{"MASTER_ADDR": nodes[0].host, "MASTER_PORT": port},
        }

    return _started(nodes, [sys.executable, *command], cwd, log, variables)


def by_mpirun(nodes: Sequence[Node], command: Sequence[str], cwd: Path, log: str) -> Job:
    """Two processes as Open MPI starts them, one a node."""
    port = free_port()

    def variables(node: Node) -> dict[str, str]:
        return {
            **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(node.number)},
            **{"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            **{"MASTER_ADDR": nodes[0].host, "MASTER_PORT": port},
        }

    return _started(nodes, [sys.executable, *command], cwd, log, variables)


def _started(
    nodes: Sequence[Node],
    command: Sequence[str],
    cwd: Path,
    log: str,
    variables: Callable[[Node], dict[str, str]],
) -> Job:
    """Start a command on each node, with that node's variables and log."""
    return Job(
        tuple(
            node.start(command, cwd, cwd / f"{log}.{node.number}.log", variables(node))
            for node in nodes
        )
    )
