"""A disk that takes no more, or a folder that goes: one line, and older checkpoints stay."""

import contextlib
import errno
import fnmatch
import functools
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dschat.config import failures
from dschat.config.cli import run_cli
from dschat.config.failures import line_for
from dschat.errors import UserError
from dschat.train import memory_use
from dschat.train.checkpoint_write import Contents, write_checkpoint
from dschat.train.metrics import LogConfig, MetricLogger, progress_bar
from dschat.train.shared_disk import check_shared
from dschat.utils import printable
from dschat.utils.distributed import Distributed
from tests.helpers.launch import ROOT, TIME_LIMIT
from tests.helpers.steps import free_port

FULL, LIMIT = "No space left on device", 20_000


class State:
    """So many bytes beside the engines, on every rank."""

    per_rank = True

    def __init__(self, size: int):
        self.size = size

    def state_dict(self) -> dict:
        return {"bytes": torch.zeros(self.size, dtype=torch.uint8)}


def save_the_old_way(state_dict: dict, path: str) -> None:
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)


class FakeEngine:
    """Writes as DeepSpeed's does: ranks wait for each other before and after."""

    def __init__(self, size: int, is_torchs: bool):
        writer = {"makedirs": os.makedirs, "save": save_the_old_way}
        if is_torchs:  # by torch.save, in a zip
            writer["zipfile_serialization"] = True
        self.size, self.checkpoint_engine = size, SimpleNamespace(**writer)
        self.module = torch.nn.Linear(1, 1)

    def module_state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def _copy_recovery_script(self, folder: str) -> None:
        Path(folder, "script").write_text("")

    def save_checkpoint(self, folder: str, tag: str, **_) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        if dist.is_initialized():
            dist.barrier()
        rank = dist.get_rank() if dist.is_initialized() else 0
        state = {"bytes": torch.zeros(self.size, dtype=torch.uint8)}
        self.checkpoint_engine.save(state_dict=state, path=f"{folder}/{tag}/{rank}.pt")
        self._copy_recovery_script(folder)
        if dist.is_initialized():
            dist.barrier()


@contextlib.contextmanager
def files_limited() -> Iterator[None]:
    """No file of this process can grow beyond LIMIT: the system's own error, of EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save(
    out: Path,
    step: int,
    engine: int = 10,
    state: int = 10,
    is_torchs: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """A checkpoint of an engine's file and another one, of so many bytes each."""
    engines = {"model": FakeEngine(engine, is_torchs)}
    contents = Contents(engines, {f"random-rank-{rank:04d}.pt": State(state)}, {"step": step})
    process = Distributed(rank, ranks, rank, torch.device("cpu"))
    write_checkpoint(str(out), step, contents, 1, process)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def present(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("large", ["engine", "another engine", "state"])
def test_a_file_that_the_disk_does_not_take(tmp_path: Path, large: str):
    save(tmp_path, 2)
    with files_limited():
        size, is_torchs = {large.split()[-1]: 10 * LIMIT}, large != "another engine"
        line = refusal(lambda: save(tmp_path, 4, **size, is_torchs=is_torchs))
    file = "random-rank-0000.pt" if large == "state" else "model/0.pt"
    assert line == (
        f"output_dir {tmp_path}: {tmp_path}/checkpoints/.step-000004.tmp/{file}: File too large; "
        f"the run stops, and its newest checkpoint is {tmp_path}/checkpoints/step-000002; fix "
        "that, and resume"
    )
    assert present(tmp_path) == ["step-000002"]
    save(tmp_path, 4)  # nothing of the engine has changed
    assert present(tmp_path) == ["step-000004"]


def test_folders_that_are_gone_or_files(tmp_path: Path):
    out = tmp_path / "out"
    none = "the run stops, and there is no checkpoint; fix that, and start again"
    line = refusal(lambda: save(out, 2))
    assert line == f"output_dir {out}: {out}: No such file or directory; {none}"
    assert not out.exists()
    out.mkdir()
    (out / "checkpoints").write_text("a file")
    line = refusal(lambda: save(out, 2))
    part = f"{out}/checkpoints/.step-000002.tmp"
    assert line == f"output_dir {out}: {part}: Not a directory; {none}"


def test_metrics_on_a_full_disk(tmp_path: Path):
    save(tmp_path, 2)
    log = MetricLogger(LogConfig(), tmp_path, rank=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    line = refusal(lambda: log.log(3, {"loss": 1.0}))
    assert line == (
        f"output_dir {tmp_path}: {tmp_path}/metrics.jsonl: {FULL}; the run stops, and its newest "
        f"checkpoint is {tmp_path}/checkpoints/step-000002; fix that, and resume"
    )


def test_metrics_that_are_removed_begin_anew_and_without_a_folder_stop(tmp_path: Path, capsys):
    out = tmp_path / "out"
    log = MetricLogger(LogConfig(), out, rank=0)
    log.log(1, {"loss": 1.0})
    (out / "metrics.jsonl").unlink()
    save(out, 1)  # as if there had been none
    assert (out / "checkpoints/step-000001/metrics.jsonl").read_text() == ""
    log.log(2, {"loss": 1.0})
    assert f"{out}/metrics.jsonl: was removed; a new one begins here\n" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_text() == '{"kind": "train", "step": 2, "loss": 1.0}\n'
    out.rename(tmp_path / "moved")
    line = refusal(lambda: log.log(3, {"loss": 1.0}))
    assert line.startswith(f"output_dir {out}: {out}/metrics.jsonl: No such file or directory; ")


@pytest.mark.parametrize("end", ["gone", "full"])
def test_events_of_tensorboard_that_cannot_be_written(
    tmp_path: Path, capsys, monkeypatch, end: str
):
    monkeypatch.setattr(threading, "excepthook", printable._show_threads_error)
    save(tmp_path, 2)
    config = LogConfig(enable_tensorboard=True, tensorboard_path=str(tmp_path / "tb"))
    log = MetricLogger(config, tmp_path, rank=0)
    log.log(1, {"loss": 1.0})
    if end == "gone":
        shutil.rmtree(tmp_path / "tb")
        reason = f"{tmp_path}/tb/events.out.tfevents.*: No such file or directory"
    else:
        (events,) = (tmp_path / "tb").iterdir()
        events.unlink()
        events.symlink_to("/dev/full")
        reason = FULL
    line = refusal(lambda: log.log(2, {"loss": 1.0}))
    newest = f"{tmp_path}/checkpoints/step-000002"
    assert fnmatch.fnmatchcase(
        line,
        f"tensorboard_path {tmp_path}/tb: {reason}; the run stops, and its newest checkpoint is "
        f"{newest}; fix that, and resume",
    )
    assert capsys.readouterr().err == ""  # nor a traceback of the writer's thread


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_log_that_takes_no_more_is_named(tmp_path: Path, closed: str):
    code = (
        "import sys; from dschat.config.cli import run_cli; from dschat.train import run_lock\n"
        "def main():\n"
        "    run_lock.hold('.')\n"
        f"    print('x', file=sys.{closed if closed != 'both' else 'stdout'}, flush=True)\n"
        "run_cli(main)"
    )
    with open("/dev/full", "w") as full:
        options = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        options |= {name: full for name in options if closed in (name, "both")}
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=tmp_path, text=True, check=False, **options)
    assert done.returncode == 1
    said = [text for text in (done.stdout, done.stderr) if text is not None]
    if closed == "both":
        assert said == []
        return
    name = {"stdout": "standard output", "stderr": "standard error"}[closed]
    (text,) = said  # on the other one
    assert text.strip() == (
        f"error: rank 0, before the first step: {name} (/dev/full): {FULL}; the run stops, and "
        "there is no checkpoint; fix that, and start again"
    )


def rank_of(rank: int, port: int, folder: Path, work: Callable[[int], None]) -> None:
    """One of two ranks; what it says goes into a file."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.GroupMember.WORLD = None  # another test's, copied by the fork
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIME_LIMIT),
    )
    try:
        work(rank)
        said = "done"
    except UserError as error:
        said = str(error)
    (folder / f"said-{rank}").write_text(said)


def on_two_ranks(folder: Path, work: Callable[[int], None]) -> list[str]:
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=rank_of, args=(r, port, folder, work)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=TIME_LIMIT)
        assert process.exitcode == 0
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def saves_twice(out: Path, failing: int, rank: int) -> None:
    save(out, 2, rank=rank, ranks=2)
    with files_limited():
        save(out, 4, engine=10 * LIMIT if rank == failing else 10, rank=rank, ranks=2)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_rank_cannot_write_stops_both_with_one_line(tmp_path: Path, failing: int):
    said = on_two_ranks(tmp_path, functools.partial(saves_twice, tmp_path, failing))
    assert said[0] == said[1]
    assert f".step-000004.tmp/model/{failing}.pt: File too large; the run stops, and its" in said[0]
    assert present(tmp_path) == ["step-000002"]


def sees(folder: Path, shared: bool, rank: int) -> None:
    name = "both" if shared else str(rank)
    (folder / name).mkdir(exist_ok=True)
    if rank == 0:
        (folder / name / ".seen-by-all-0").touch()  # of a run that was killed there
    check_shared(str(folder / name), patience=0.2)


@pytest.mark.parametrize("shared", [True, False])
def test_every_rank_must_see_the_output_folder(tmp_path: Path, shared: bool):
    said = on_two_ranks(tmp_path, functools.partial(sees, tmp_path, shared))
    if shared:
        assert said == ["done", "done"] and list((tmp_path / "both").iterdir()) == []
    else:
        assert said[0] == said[1]
        assert said[0].startswith(f"output_dir {tmp_path}/1: ")
        assert (
            "does not see what rank 0 writes there, as checkpoints need; give a folder" in said[0]
        )
        assert list((tmp_path / "0").iterdir()) == []


def out_of_cpu_memory() -> None:
    torch.empty(10**15)


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\n and more")


def full_disk() -> None:
    raise OSError(28, "No space left on device", "events.out")


@pytest.mark.parametrize(
    "work, told",
    [
        (out_of_cpu_memory, "out of memory; lower the micro-batch (--per_device_train_batch_size;"),
        (out_of_device_memory, "out of memory on the device; lower the micro-batch"),
        (full_disk, f"events.out: {FULL}; free some space, and start again with --resume"),
    ],
)
def test_what_runs_out_is_one_line_with_the_step(monkeypatch, capsys, work, told: str):
    monkeypatch.setattr(failures.StepBar, "made", None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        run_cli(work)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: rank 1, before the first step: {told}")
    bar = progress_bar(9, "train", MetricLogger(LogConfig(), None, rank=1))  # shown by rank 0 alone
    bar.update(1)
    bar.update(1)
    assert str(line_for(MemoryError())).startswith("step 3: out of memory; ")


def test_a_device_that_is_full_names_flags_and_what_they_save(monkeypatch):
    gib = memory_use.GIB
    monkeypatch.setattr(failures.StepBar, "made", 2)
    monkeypatch.setattr(memory_use, "_built", [])
    monkeypatch.setattr(memory_use, "allocated", lambda: 4 * gib)
    monkeypatch.setattr(memory_use, "peak", lambda: 12 * gib)
    memory_use.note_engine("", 8, checkpointing=False)
    error = torch.OutOfMemoryError("CUDA out of memory")
    line = str(line_for(error))
    # 8 GiB for 8 rows: half the rows take half of them.
    assert line.startswith(
        "step 3: out of memory on the device; 4.0 GiB were held when it was set up, and passes "
        "of 8 rows added up to 8.0 GiB: --per_device_train_batch_size 4 with more "
        "--gradient_accumulation_steps saves about 4.0 GiB, --gradient_checkpointing saves most"
    )
    monkeypatch.setattr(memory_use, "_built", [])
    memory_use.note_engine("actor", 1, checkpointing=True)
    memory_use.note_engine("critic", 1, checkpointing=False)
    line = str(line_for(error))
    assert "batch_size" not in line and "--actor_gradient" not in line
    assert "--critic_gradient_checkpointing" in line and "--generation_chunk_size" in line


def test_other_errors_keep_their_traceback():
    def bug() -> None:
        raise FileNotFoundError(2, "No such file or directory", "typo")

    with pytest.raises(FileNotFoundError):
        run_cli(bug)


def test_a_folder_that_this_user_may_not_have_is_one_line():
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/x/.cache")
    line = line_for(error)
    assert line is not None and line.endswith(
        ": /home/x/.cache: Permission denied; let this user have it, and start again with --resume"
    )
    assert line_for(PermissionError(errno.EPERM, "of no file")) is None
