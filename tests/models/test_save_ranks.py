"""Saving on several ranks: no time limit of a collective, and an error of rank 0 ends all."""

import multiprocessing
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dschat.config.failures import line_for
from dschat.errors import UserError
from dschat.models import save
from dschat.models.folder_plan import plan_folder
from dschat.models.save import save_hf_format
from dschat.train.metrics import StepBar
from dschat.utils.distributed import Distributed
from dschat.utils.waiting import LostRankError
from tests.helpers import tiny
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.steps import free_port

LONGEST_WAIT = timedelta(seconds=1)  # of a collective


def rank_of(rank: int, port: str, folder: Path, trouble: str) -> None:
    """Save a model in shards while rank 0 has some trouble; what this rank says goes to a file."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.GroupMember.WORLD = StepBar.made = None  # other tests', copied by the fork
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIME_LIMIT),
    )
    dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT)
    dist.distributed_c10d._get_default_store().set_timeout(LONGEST_WAIT)
    written = []

    def write(tensors, path, metadata):
        if trouble == "slow" and not written:
            time.sleep(2.5 * LONGEST_WAIT.total_seconds())
        if trouble == "killed" and written:
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "full" and written:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        written.append(path)
        original(tensors, path, metadata=metadata)

    original, save.save_file = save.save_file, write
    save.plan_folder = lambda module, form: plan_folder(module, form, 20_000)
    try:
        process = Distributed(rank, 2, rank, torch.device("cpu"))
        save_hf_format(tiny.tiny_llama(), tiny.byte_tokenizer(), folder / "out", process)
        said = "done"
    except UserError as error:
        said = f"error: {error}"
    except LostRankError as error:
        said = f"lost: {line_for(error)}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / f"said-{rank}").write_text(said)


def said_by(folder: Path, trouble: str) -> list[str]:
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=rank_of, args=(r, port, folder, trouble)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=TIME_LIMIT)
    files = [folder / f"said-{rank}" for rank in range(2)]
    return [file.read_text() if file.exists() else "" for file in files]


@pytest.mark.slow
def test_a_save_longer_than_a_collective_may_take(tmp_path: Path):
    assert said_by(tmp_path, "slow") == ["done", "done"]
    assert (tmp_path / "out/config.json").is_file()


def test_a_disk_that_fills_up_ends_all_ranks_with_one_line(tmp_path: Path):
    said = said_by(tmp_path, "full")
    assert said[0] == said[1]
    file = f"{tmp_path}/out/.model.tmp/model-00002-of-"
    assert said[0].startswith(f"error: output_dir {tmp_path}/out: {file}")
    assert ".safetensors: File too large; no model was written, what was there stays" in said[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_the_end_of_rank_0_ends_the_others(tmp_path: Path):
    told = "rank 0, or the launcher, ended while this rank waited for it"
    assert said_by(tmp_path, "killed") == ["", f"lost: before the first step: {told}"]
