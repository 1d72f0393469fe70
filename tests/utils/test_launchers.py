"""Ranks by the variables of srun, mpirun and mpiexec, as these set them."""

import random
import subprocess

import pytest

from dschat.errors import UserError
from dschat.utils import launchers
from dschat.utils.launchers import rank_of, torch_variables

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPENMPI.items()}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TWO_ON_ONE_HOST = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_process_by_itself_and_one_of_torchrun():
    assert torch_variables({}) == {} and rank_of({}) == 0
    given = {**SRUN, **TWO_ON_ONE_HOST, "WORLD_SIZE": "8", "RANK": "6"}
    assert torch_variables(given) == {} and rank_of(given) == 6
    alone = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert torch_variables(alone) == {}


def test_a_number_of_processes_that_the_user_set_besides():
    """WORLD_SIZE alone tells no process its rank."""
    there = {"MASTER_ADDR": "there", "MASTER_PORT": "1234"}
    found = torch_variables(SRUN | there | {"WORLD_SIZE": "4"})
    assert found == {"RANK": "3", "LOCAL_RANK": "1"}
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and SLURM_STEP_NUM_TASKS 4: unset"):
        torch_variables(SRUN | there | {"WORLD_SIZE": "2"})


def test_srun_that_tells_its_tasks_but_not_its_step():
    """A script of sbatch has the same variables, so MASTER_ADDR decides."""
    older = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert torch_variables(older | {"MASTER_ADDR": "node07", "SLURM_JOB_ID": "7"}) == {
        **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "20007"}
    }
    step = {"SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "node07"}
    assert torch_variables(older | step | {"SLURM_PROCID": "0"}) == {}


def test_launchers_that_srun_started_each_for_itself():
    torchrun = TWO_ON_ONE_HOST | {"LOCAL_WORLD_SIZE": "2"}
    deepspeed = TWO_ON_ONE_HOST | {"LOCAL_SIZE": "2"}
    for variables in (torchrun, deepspeed):
        assert torch_variables(variables) == {}
        with pytest.raises(UserError, match="srun started 4 launchers, and each is a run of its"):
            torch_variables(SRUN | variables)
        assert torch_variables(SRUN | variables | {"WORLD_SIZE": "8"}) == {}


@pytest.mark.parametrize("environ", [OPENMPI, MVAPICH, MPICH])
def test_mpi_on_one_host(environ):
    assert torch_variables(environ) == TWO_ON_ONE_HOST and rank_of(environ) == 1
    there = {"MASTER_ADDR": "there", "MASTER_PORT": "1234"}
    kept = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert torch_variables(environ | there) == {name: TWO_ON_ONE_HOST[name] for name in kept}


def test_mpirun_that_was_started_by_srun():
    """Of the processes that srun started, one a host, each starts two."""
    started = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert torch_variables(OPENMPI | started)["RANK"] == "1"
    assert torch_variables(MPICH | started)["RANK"] == "1"


def test_srun_on_two_hosts(monkeypatch):
    def run(command, **_):
        assert command == ["scontrol", "show", "hostnames", "node[07-08]"]
        return subprocess.CompletedProcess(command, 0, "node07\nnode08\n")

    monkeypatch.setattr(launchers.subprocess, "run", run)
    assert torch_variables(SRUN) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "26456",  # 20000 + 123456 % 9000
    }
    assert rank_of(SRUN) == 3


@pytest.mark.parametrize(
    "environ, message",
    [
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun on several hosts: set MASTER_ADDR"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
            "SLURM_NTASKS is 2, and nothing tells this process its place among them: start them by "
            "srun or torchrun, or one alone by `srun --ntasks 1`",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_SIZE is 2, and nothing tells this process"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE is 2, and nothing tells this process",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "there"}, "WORLD_SIZE is 2, and nothing tells"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is 1, and nothing tells how many processes there are"),
        ({"RANK": "1"}, "RANK is 1, and nothing tells how many processes there are"),
        ({"PMI_SIZE": "two"}, "PMI_SIZE is 'two' in the environment: set a number, or unset it"),
        (TWO_ON_ONE_HOST | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2: processes count from 0"),
        (TWO_ON_ONE_HOST | {"MASTER_ADDR": ""}, "WORLD_SIZE is 2: set MASTER_ADDR to the host of"),
        (TWO_ON_ONE_HOST | {"MASTER_PORT": "0"}, "MASTER_PORT is 0: set a free port of rank 0's"),
        (OPENMPI | {"MASTER_PORT": "ten"}, "MASTER_PORT is 'ten' in the environment: set a number"),
        (
            OPENMPI | {"RANK": "0"},
            "RANK is 0 and OMPI_COMM_WORLD_RANK 1: unset RANK, which is this",
        ),
    ],
)
def test_ranks_that_cannot_find_each_other(environ, message):
    with pytest.raises(UserError) as error:
        torch_variables(environ)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_missing_scontrol_asks_for_the_address(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="srun on several hosts: set MASTER_ADDR to the first one"):
        torch_variables(SRUN)


def test_any_mixture_of_variables_is_a_place_among_others_or_one_line(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, "node07\n")

    monkeypatch.setattr(launchers.subprocess, "run", run)
    names = sorted({*SRUN, *OPENMPI, *MVAPICH, *MPICH, *TWO_ON_ONE_HOST, "LOCAL_SIZE", "PMIX_RANK"})
    bases = [{}, SRUN, OPENMPI, MVAPICH, MPICH, TWO_ON_ONE_HOST]
    draw, sound = random.Random(0), ["0", "1", "2", "4"]
    places = 0
    for i in range(20_000):
        values = sound if i % 2 else [*sound, "", " 2 ", "x", "-1", "1.5", "99999"]
        more = {n: draw.choice(values) for n in draw.sample(names, draw.randint(1, 6))}
        environ = draw.choice(bases) | more
        try:
            found = environ | torch_variables(environ)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        place = {name: value for name, value in found.items() if value.strip()}
        size = int(place.get("WORLD_SIZE", 1))
        assert all(0 <= int(place.get(name, 0)) < size for name in ("RANK", "LOCAL_RANK")), environ
        if size > 1:
            assert place["MASTER_ADDR"] and 0 < int(place["MASTER_PORT"]) < 65536, environ
            places += 1
    assert places > 100
