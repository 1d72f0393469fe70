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
        local_size: processes of this host; None where it is not known.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str | None


SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None)
# In this order: mpirun and mpiexec start their processes by srun, whose variables are then theirs.
LAUNCHERS = (
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "mpirun_rsh",  # MVAPICH2
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SRUN,
)
# A script of sbatch has these variables too, for tasks that only srun starts: they count where the
# user says besides where the first task is.
SBATCH = Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None)
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORT = 29500  # torch's own


def torch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Translate a launcher's variables into RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Returns:
        Those that are missing; none under torchrun and deepspeed, nor for a process by itself.

    Raises:
        UserError: several processes, and nothing tells them apart, or says where the first one is.
    """
    launcher = _launcher_of(environ)
    if all(name in environ for name in PLACE):
        _check_whole(environ)
        if "MASTER_PORT" in environ or _number(environ, "WORLD_SIZE") == 1:
            return {}
    if launcher is None:
        _check_lone(environ)
        return {}
    rank, size = environ[launcher.rank], environ[launcher.size]
    if "RANK" not in environ and environ.get("WORLD_SIZE", size) != size:
        raise UserError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} and {launcher.size} {size}: unset WORLD_SIZE, "
            "which is the number of all processes"
        )
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": environ[launcher.local_rank]}
    found |= {"MASTER_ADDR": _first_host(launcher, environ), "MASTER_PORT": str(_port(environ))}
    return {name: value for name, value in found.items() if name not in environ}


def rank_of(environ: Mapping[str, str]) -> int:
    """Find this process's rank; 0 for a process by itself."""
    if "RANK" in environ:
        return _number(environ, "RANK")
    launcher = _launcher_of(environ)
    return 0 if launcher is None else _number(environ, launcher.rank)


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """Read a number; an empty variable counts as missing.

    Raises:
        UserError: it is none.
    """
    value = environ.get(name, "").strip() or str(default)
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r} in the environment: set a number, or unset it")
    return int(value)


def _launcher_of(environ: Mapping[str, str]) -> Launcher | None:
    """Find the launcher of several processes that tells this one its place among them."""
    is_step = SRUN.size in environ
    more = (SBATCH,) if "MASTER_ADDR" in environ and not is_step else ()
    for launcher in (*LAUNCHERS, *more):
        known = {launcher.rank, launcher.size, launcher.local_rank} <= environ.keys()
        if known and _number(environ, launcher.size) > 1:
            return launcher
    return None


def _check_lone(environ: Mapping[str, str]) -> None:
    """Stop where there seem to be several processes, and nothing tells them apart."""
    sizes = ["WORLD_SIZE", *(launcher.size for launcher in LAUNCHERS)]
    if environ.get(SRUN.size) != "1":
        sizes.append(SBATCH.size)
    for size in sizes:
        if _number(environ, size) > 1:
            raise UserError(
                f"{size} is {environ[size]}, and nothing tells this process its place among them: "
                "start them by srun or torchrun, or one alone by `srun --ntasks 1`"
            )
    # Of some launchers processes know their rank and not how many there are.
    for rank in ("RANK", "PMIX_RANK", *(launcher.rank for launcher in LAUNCHERS)):
        if _number(environ, rank) > 0:
            raise UserError(
                f"{rank} is {environ[rank]}, and nothing tells how many processes there are: "
                "start them by srun or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"
            )


def _check_whole(environ: Mapping[str, str]) -> None:
    """Stop where several launchers of one machine were started, each for a run of its own."""
    per_host = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    tasks = _number(environ, SRUN.size)
    if per_host == environ["WORLD_SIZE"] and tasks > 1:
        raise UserError(
            f"srun started {tasks} launchers, and each is a run of its own: give torchrun "
            f"--nnodes {tasks} and --rdzv_endpoint, or unset SLURM_STEP_NUM_TASKS if that is meant"
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
