"""Work done once a node while the others wait for longer than a collective may take."""

import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dschat.errors import UserError
from dschat.utils.waiting import from_local_main, from_waiting_main
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.steps import free_port

RANKS, PER_NODE = 4, 2
LONGEST_WAIT = timedelta(seconds=1)  # of a collective


def _rank(
    rank: int, port: str, folder: Path, slow: bool, bad_node: int | None, fault: type[Exception]
) -> None:
    local, node = rank % PER_NODE, rank // PER_NODE
    os.environ["LOCAL_RANK"] = str(local)
    # Other tests may have left a process group; its forked copy here is nobody's.
    dist.GroupMember.WORLD = None
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIME_LIMIT),
    )
    # Only now, so that a slow machine has time to meet: what waits longer than this has failed.
    dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT)
    dist.distributed_c10d._get_default_store().set_timeout(LONGEST_WAIT)

    def work() -> str:
        if slow and node == 0:
            time.sleep(2.5 * LONGEST_WAIT.total_seconds())
        if node == bad_node:
            raise fault(f"bad data of node {node}")
        return f"made by {rank}"

    try:
        said = [from_local_main(work), from_local_main(lambda: f"again {rank}")]
        said.append(from_waiting_main(lambda: f"made by {rank}"))
    except UserError as error:
        said = [f"error: {error}"]
    except (KeyError, RuntimeError) as error:
        said = [f"{type(error).__name__}: {error}"]
    (folder / str(rank)).write_text("\n".join(said))


def _said(
    folder: Path,
    slow: bool = False,
    bad_node: int | None = None,
    fault: type[Exception] = UserError,
) -> list[list[str]]:
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [
        fork.Process(target=_rank, args=(rank, port, folder, slow, bad_node, fault))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=TIME_LIMIT)
        assert process.exitcode == 0
    return [(folder / str(rank)).read_text().split("\n") for rank in range(RANKS)]


def test_the_first_of_each_node_works_and_all_wait_for_the_slowest(tmp_path):
    first, second = (["made by " + n, "again " + n, "made by 0"] for n in "02")
    assert _said(tmp_path, slow=True) == [first, first, second, second]


@pytest.mark.parametrize("node", [0, 1])
def test_bad_input_of_one_node_stops_all_with_its_line(tmp_path, node):
    assert _said(tmp_path, bad_node=node) == 4 * [[f"error: bad data of node {node}"]]


def test_another_error_of_one_rank_ends_all(tmp_path):
    others = ["RuntimeError: another rank failed: KeyError: 'bad data of node 1'"]
    said = _said(tmp_path, bad_node=1, fault=KeyError)
    assert said == [others, others, ["KeyError: 'bad data of node 1'"], others]


def test_alone_it_is_the_work():
    assert from_local_main(lambda: "done") == "done"
    assert from_waiting_main(lambda: "done") == "done"
