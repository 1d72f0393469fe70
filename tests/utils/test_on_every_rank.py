"""An error of one rank stops all of them with its line."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dschat.errors import UserError
from dschat.utils.distributed import on_every_rank
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.steps import free_port

RANKS = 2


def _rank(rank: int, port: str, folder: Path, bad: set[int]) -> None:
    # Other tests may have left a process group; its forked copy here is nobody's.
    dist.GroupMember.WORLD = None
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=TIME_LIMIT)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=limit)

    def work() -> str:
        if rank in bad:
            raise UserError(f"bad row of rank {rank}")
        return f"made by {rank}"

    try:
        said = on_every_rank(work)
    except UserError as error:
        said = f"error: {error}"
    (folder / str(rank)).write_text(said)
    dist.barrier()  # nobody is left behind in a collective


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (set(), ["made by 0", "made by 1"]),
        ({1}, 2 * ["error: bad row of rank 1"]),
        ({0, 1}, 2 * ["error: bad row of rank 0"]),
    ],
)
def test_all_or_none(tmp_path, bad, said):
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=_rank, args=(r, port, tmp_path, bad)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=TIME_LIMIT)
        assert process.exitcode == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(RANKS)] == said
