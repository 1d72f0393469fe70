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
        Those that are missing or empty; none under torchrun and deepspeed, nor for a process by
        itself.

    Raises:
        UserError: several processes, and nothing tells them apart, or says where the first one is;
            a place that no process can have.
    """
    given = _given(environ)
    found = _translated(given)
    _check_place(given | found)
    return found


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    """Leave out empty variables; they count as missing."""
    return {name: value.strip() for name, value in environ.items() if value.strip()}


def _translated(environ: Mapping[str, str]) -> dict[str, str]:
    launcher = _launcher_of(environ)
    is_whole = all(name in environ for name in PLACE)
    if is_whole:
        _check_whole(environ)
        is_met = {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys()
        if is_met or launcher is None or _number(environ, "WORLD_SIZE") == 1:
            return {}  # what is missing is asked for
    if launcher is None:
        _check_lone(environ)
        return {}
    rank, size = environ[launcher.rank], environ[launcher.size]
    for name, own, given, meaning in (
        ("WORLD_SIZE", launcher.size, size, "the number of all processes"),
        ("RANK", launcher.rank, rank, "this process's place among them"),
    ):
        if not is_whole and environ.get(name, given) != given:
            raise UserError(
                f"{name} is {environ[name]} and {own} {given}: unset {name}, which is {meaning}"
            )
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": environ[launcher.local_rank]}
    found |= {"MASTER_ADDR": _first_host(launcher, environ), "MASTER_PORT": str(_port(environ))}
    return {name: value for name, value in found.items() if name not in environ}


def rank_of(environ: Mapping[str, str]) -> int:
    """Find this process's rank; 0 for a process by itself."""
    environ = _given(environ)
    if "RANK" in environ:
        return _number(environ, "RANK")
    launcher = _launcher_of(environ)
    return 0 if launcher is None else _number(environ, launcher.rank)


def is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Tell whether other processes of the same run were started beside this one."""
    environ = _given(environ)
    return _launcher_of(environ) is not None or _number(environ, "WORLD_SIZE", 1) > 1


def _check_place(place: Mapping[str, str]) -> None:
    """Refuse a place that no process of a run can have, or that leads to no other process."""
    size = _number(place, "WORLD_SIZE", 1)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(place, name) >= size:
            raise UserError(
                f"{name} is {place.get(name, 0)} and WORLD_SIZE {size}: processes count from 0 to "
                "WORLD_SIZE - 1"
            )
    if size > 1 and "MASTER_ADDR" not in place:
        raise UserError(f"WORLD_SIZE is {size}: set MASTER_ADDR to the host of rank 0")
    if size > 1 and not 0 < _number(place, "MASTER_PORT") < 65536:
        port = place.get("MASTER_PORT", "missing")
        raise UserError(f"MASTER_PORT is {port}: set a free port of rank 0's host, 1 to 65535")


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
    """Check that several processes, if there seem to be some, have ranks of their own."""
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
    """Check that the launchers of one machine do not each start a run of their own."""
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
        return _number(environ, "MASTER_PORT")
    return 20000 + _number(environ, "SLURM_JOB_ID") % 9000 if "SLURM_JOB_ID" in environ else PORT
