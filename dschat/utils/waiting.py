"""Work of one rank for which the others wait without a collective, whose time limit would end them.

They ask the process group's store now and then. Errors of the work end all ranks; so does the end
of the process that holds the store, which is rank 0's or the launcher's.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

from dschat.errors import UserError, brief
from dschat.lazy import dist
from dschat.utils.places import waiting, working
from dschat.utils.rank_watch import LostRankError

_turns = itertools.count()  # every rank takes the same ones


def from_local_main(work: Callable[[], str]) -> str:
    """Run `work` on the first process of each node, and return its result on all of that node.

    All come back when all nodes are done.

    Raises:
        UserError: on every rank, when any `work` met one: all stop with the same line.
        RuntimeError: on every other rank, when one met another error.
        LostRankError: a process ended instead.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    node = dist.get_rank() - int(os.environ["LOCAL_RANK"])  # by its first rank
    return _from(node, work)


def from_waiting_main(work: Callable[[], str]) -> str:
    """Run `work` on rank 0 alone, and return its result on every rank; likewise."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    return _from(0, work)


def _from(worker: int, work: Callable[[], str]) -> str:
    try:
        with waiting(f"the work of rank {worker}", patient=True):
            return _from_by_store(worker, work)
    except dist.DistNetworkError as error:
        raise LostRankError(
            f"rank {worker}, or the launcher, ended while this rank waited for it"
        ) from error


def _from_by_store(worker: int, work: Callable[[], str]) -> str:
    store = dist.distributed_c10d._get_default_store()  # keys and values that all ranks see
    turn = next(_turns)
    names = (worker, "problem", "fault", "arrived", "informed")
    done, problem, fault, arrived, informed = (f"dschat/{turn}/{name}" for name in names)
    own: Exception | None = None
    if dist.get_rank() == worker:
        result = ""
        try:
            with working():
                result = work()
        except Exception as error:
            own = error
            is_known = isinstance(error, UserError)
            store.set(
                problem if is_known else fault, str(error) if is_known else brief(error, True)
            )
        store.set(done, result)
    _until(lambda: store.check([done]))
    store.add(arrived, 1)
    _until(lambda: store.add(arrived, 0) == dist.get_world_size())
    message = store.get(problem).decode() if store.check([problem]) else None
    failure = store.get(fault).decode() if store.check([fault]) else None
    result = store.get(done).decode()
    store.add(informed, 1)
    if dist.get_rank() == 0:  # it holds the store: stopping now would leave the others unheard
        _until(lambda: store.add(informed, 0) == dist.get_world_size())
    if own is not None and failure is not None:
        raise own
    if message is not None:
        raise UserError(message)
    if failure is not None:
        raise RuntimeError(f"another rank failed: {failure}")
    return result


def _until(is_true: Callable[[], bool], longest_wait: float = 1.0) -> None:
    """Ask again and again, at growing intervals in seconds."""
    wait = 0.001
    while not is_true():
        time.sleep(wait)
        wait = min(1.25 * wait, longest_wait)  # at most a quarter of the waiting is in vain
