"""Ranks by the variables of launchers that do not set torch's: srun, mpirun, mpiexec."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from dschat.errors import UserError


@dataclass(frozen=True)
class Launcher:
    """Names of the variables in which a launcher tells each process its place.

    Attributes:
        local_size: processes of this host; None where it is not told.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None


# In this order: mpirun and mpiexec start their processes by srun, whose variables are then theirs.
LAUNCHERS = (
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
)
PORT = 29500  # torch's own


def torch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Translate a launcher's variables into RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Returns:
        Those that are missing; none under torchrun and deepspeed, nor for a process by itself.

    Raises:
        UserError: several processes, and nothing says where the first one is.
    """
    if "WORLD_SIZE" in environ:
        return {}
    launcher = _launcher_of(environ)
    if launcher is None:
        _check_lone(environ)
        return {}
    rank, size = environ[launcher.rank], environ[launcher.size]
    local_rank = environ[launcher.local_rank]
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    found |= {"MASTER_ADDR": _first_host(launcher, environ), "MASTER_PORT": str(_port(environ))}
    return {name: value for name, value in found.items() if name not in environ}


def rank_of(environ: Mapping[str, str]) -> int:
    """Find this process's rank; 0 for a process by itself."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return int(environ.get("RANK", "0"))
    launcher = _launcher_of(environ)
    return 0 if launcher is None else int(environ[launcher.rank])


def _launcher_of(environ: Mapping[str, str]) -> Launcher | None:
    """Find the launcher of several processes that tells this one its place among them."""
    for launcher in LAUNCHERS:
        known = {launcher.rank, launcher.size, launcher.local_rank} <= environ.keys()
        if known and int(environ[launcher.size]) > 1:
            return launcher
    return None


def _check_lone(environ: Mapping[str, str]) -> None:
    """Stop where there seem to be several processes, and nothing tells them apart.

    A script of sbatch has the number of tasks, which only srun starts.
    """
    for rank, size in (("SLURM_PROCID", "SLURM_NTASKS"), ("PMI_RANK", "PMI_SIZE")):
        step = environ.get("SLURM_STEP_NUM_TASKS", "2")
        if rank in environ and int(environ.get(size, "1")) > 1 and int(step) > 1:
            raise UserError(
                f"{size} is {environ[size]}, and nothing tells this process its place among them: "
                "start them by srun or torchrun, or one alone by `srun --ntasks 1`"
            )


def _first_host(launcher: Launcher, environ: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if launcher.local_size is not None:
        is_one_host = environ.get(launcher.local_size) == environ[launcher.size]
    else:
        is_one_host = environ.get("SLURM_STEP_NUM_NODES") == "1"
    if is_one_host:
        return "127.0.0.1"
    if "SLURM_STEP_NODELIST" in environ:
        command = ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]]
        try:
            hosts = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return hosts.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass  # asked for below
    raise UserError(f"{launcher.name} on several hosts: set MASTER_ADDR to the first one's name")


def _port(environ: Mapping[str, str]) -> int:
    """Choose the same port in all processes, of Slurm's jobs each its own."""
    if "MASTER_PORT" in environ:
        return int(environ["MASTER_PORT"])
    job = environ.get("SLURM_JOB_ID")
    return PORT if job is None else 20000 + int(job) % 9000
