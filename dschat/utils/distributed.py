"""Start under `deepspeed`, `torchrun` or plain python; ranks, seeds, reductions."""

from __future__ import annotations

import os
import random
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from dschat.errors import UserError, brief
from dschat.lazy import dist, np, torch
from dschat.utils import rank_watch
from dschat.utils.launchers import rank_of, torch_variables
from dschat.utils.places import waiting, working
from dschat.utils.printable import fitted, printable, window

Result = TypeVar("Result")

RANK_TIMEOUT = 600  # seconds
LONGEST_COLLECTIVE = 7200.0  # seconds
# Of a process that no launcher started.
LONE = {
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}


@dataclass(frozen=True)
class Distributed:
    """One process of a run, its place among the others, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the process that prints and writes."""
        return self.rank == 0


def init_distributed(rank_timeout: float = RANK_TIMEOUT) -> Distributed:
    """Join the process group that the launcher describes; without one, be a group of one.

    Launchers are torchrun, deepspeed, and those of `launchers.LAUNCHERS`. Several ranks watch over
    each other from here.

    Args:
        rank_timeout: seconds to wait for another rank, here and later.

    Raises:
        UserError: nothing says where the other processes are.
        LostRankError: they do not come.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed, once per bucket.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.update(torch_variables(os.environ))
    for name, value in LONE.items():  # DeepSpeed looks for them
        os.environ[name] = os.environ.get(name, "").strip() or value
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile an all-reduce here that only its inference engine calls: half a
        # minute, a need for a C++ compiler, and a lock file that outlives a killed process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks = int(os.environ["WORLD_SIZE"])
    backend = accelerator.communication_backend_name()
    if ranks > 1:
        _meet(backend, ranks, rank_timeout)
    elif not dist.is_initialized():  # without a port, which another process might have
        dist.init_process_group(backend, store=dist.HashStore(), world_size=1, rank=0)
    deepspeed.init_distributed(verbose=False)
    name = accelerator.device_name(local_rank)
    return Distributed(dist.get_rank(), dist.get_world_size(), local_rank, torch.device(name))


def _meet(backend: str, ranks: int, timeout: float) -> None:
    """Build the process group of several ranks, and start the watch over them."""
    rank = launched_rank()
    if not dist.is_initialized():
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            if rank != 0:
                _reach(address, port, timeout)  # torch would print its stack again and again
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        except (OSError, dist.DistError) as error:
            place = f"{address}:{port}"
            raise rank_watch.LostRankError(
                f"rank {rank} of {ranks} waited {timeout:g} s at {place} for the others to start "
                f"({brief(error)})"
            ) from error
        # After a restart the store of torchrun still has the addresses of the ranks that ended.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"dschat/attempt {attempt}", store)
        # Below the watch: where all ranks live and none hears the others.
        limit = timedelta(seconds=max(2 * timeout, LONGEST_COLLECTIVE))
        rank_watch.start(store, rank, ranks, timeout)
        dist.init_process_group(backend, timeout=limit, world_size=ranks, rank=rank, store=store)
    else:
        store = dist.distributed_c10d._get_default_store()
        rank_watch.start(store, rank, ranks, timeout)


def _reach(address: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there.

    Raises:
        OSError: the last reason why nobody was reached in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=min(timeout, 60.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def launched_rank() -> int:
    """Return the rank that the launcher set; usable before `init_distributed`."""
    return rank_of(os.environ)


def from_main(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 alone, and return its result on every rank.

    Raises:
        UserError: on every rank, when rank 0 met one: all stop with the same line.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]  # result, message of an error
    with waiting("the work of rank 0", patient=True):
        if dist.get_rank() == 0:
            try:
                with working():
                    outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank, and return this rank's result.

    Raises:
        UserError: on every rank, when any rank met one: all stop with the line of the first.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    results: list[Result] = []
    message = None
    try:
        results.append(work())
    except UserError as error:
        message = str(error)
    for problem in all_gather(message):
        if problem is not None:
            raise UserError(problem)
    return results[0]


def all_gather(value: Result) -> list[Result]:
    """Collect a picklable value of every rank, in the order of ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with waiting("a gather"):
        dist.all_gather_object(values, value)
    return values


def barrier(name: str = "a barrier", patient: bool = False) -> None:
    """Wait for every rank.

    Args:
        name: of the place, for messages. patient: one of them may work until then for hours.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        with waiting(name, patient):
            dist.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over the ranks, in float64, on this rank's device."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Sequence[float]) -> list[float]:
    """Largest of each value over the ranks, likewise."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(v) for v in values]
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    with waiting("an all-reduce"):
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


def set_random_seed(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def print_rank_0(message: str, rank: int | None = None) -> None:
    """Print on rank 0 alone, without characters that steer a terminal.

    Args:
        rank: of this process; by default the process group's.
    """
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else launched_rank()
    if rank == 0:
        print(fitted(printable(str(message)), window()), flush=True)
