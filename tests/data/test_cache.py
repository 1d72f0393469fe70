"""One writer at a time, whole or nothing: several runs, killed ones, edited files, full disks."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

import dschat.data.datasets
from dschat.data import tokenise
from dschat.data.store import written_once
from dschat.errors import UserError
from tests.data.spec import Spec
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.tiny import byte_tokenizer

ROWS = 3000


def _run(source: str, folder: Path, workers: int, limit: int | None) -> None:
    """Make the tokenised set of a file, as a run would, in a process of its own.

    Writes `said-PID`: a digest of the rows, or the error; and `started-PID` when a process begins
    to tokenise. `limit` is the longest file that may be written, as on a disk that is full.
    """
    place, convert = folder.parent, tokenise.Converter._sft_rows

    def announced(*args, **options):
        (place / f"started-{os.getpid()}").touch()
        return convert(*args, **options)

    tokenise.Converter._sft_rows = announced
    dschat.data.datasets.check_room = lambda *args: None  # which tokenises some rows first
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    spec = Spec(
        data_path=(source,),
        data_split="1",
        data_output_path=str(folder),
        max_seq_len=256,
        preprocessing_num_workers=workers,
    )
    try:
        data = spec.make(byte_tokenizer(), 1)
        rows = json.dumps([data.train.to_list(), data.eval.to_list()])
        said = f"{hashlib.sha256(rows.encode()).hexdigest()} {data.report.sources[0].used}"
    except UserError as error:
        said = f"error: {error}"
    (place / f"said-{os.getpid()}").write_text(said)


def _start(source: str, folder: Path, workers: int = 1, limit: int | None = None) -> BaseProcess:
    fork = multiprocessing.get_context("fork")  # no seconds of imports
    process = fork.Process(target=_run, args=(source, folder, workers, limit))
    process.start()
    return process


def _end(process: BaseProcess, folder: Path) -> str:
    """What it said."""
    process.join(timeout=TIME_LIMIT)
    assert process.exitcode == 0
    return (folder.parent / f"said-{process.pid}").read_text()


def _started(folder: Path) -> list[int]:
    """The processes that began to tokenise."""
    return [int(path.name.split("-")[1]) for path in folder.parent.glob("started-*")]


def _until(seen) -> object:
    deadline = time.monotonic() + TIME_LIMIT
    while not (found := seen()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def _left(folder: Path) -> list[Path]:
    return [*folder.rglob("*.tmp"), *folder.rglob("tmp*")]


@pytest.fixture
def source(write_rows) -> str:
    return write_rows(
        [{"prompt": f"hi {n}", "chosen": f" we {n} " * 12, "rejected": ""} for n in range(ROWS)]
    )


def test_two_runs_at_once_and_one_that_was_killed_before(source, tmp_path):
    """The killed run has two workers: they go too, and hold nothing up."""
    folder = tmp_path / "cache"
    killed = _start(source, folder, workers=2)
    workers = _until(lambda: _started(folder))
    assert killed.pid not in workers
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert _left(folder)  # it was in the middle of it
    _until(lambda: not any(_runs(pid) for pid in workers))
    for path in tmp_path.glob("started-*"):
        path.unlink()
    both = [_start(source, folder) for _ in range(2)]
    said = [_end(process, folder) for process in both]
    assert said[0] == said[1] and said[0].endswith(f" {ROWS * 9 // 10}")
    assert not _left(folder)
    assert len(_started(folder)) == 1  # tokenised once


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_edited_file_is_another_set(source, tmp_path):
    folder = tmp_path / "cache"
    before = _end(_start(source, folder), folder)
    path = Path(source)
    path.write_text(path.read_text().replace('hi 7"', 'hi 8"'))
    assert _end(_start(source, folder), folder) != before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, workers):
    folder = tmp_path / "cache"
    # The rows fit, their tokens do not.
    rows = sum(len(f"hi {n}") + 12 * len(f" we {n} ") for n in range(ROWS)) + 100 * ROWS
    said = _end(_start(source, folder, workers, limit=rows), folder)
    assert said.startswith(f"error: {folder} cannot be written (File too large): free some space")
    assert "\n" not in said and not _left(folder)
    assert sorted(p.name for p in folder.iterdir()) == [".locks", "sources"]
    assert len(list((folder / "sources").glob("*.arrow"))) == 1
    assert _end(_start(source, folder, workers), folder).endswith(f" {ROWS * 9 // 10}")


def _writes(text: str, seen: list[str]):
    def write(path: Path) -> None:
        seen.append(text)
        path.write_text(text)

    return write


def test_what_is_there_is_not_written_again(tmp_path):
    seen: list[str] = []
    for text in ("one", "two"):
        path = written_once(tmp_path / "deep", "name", _writes(text, seen))
    assert seen == ["one"] and path.read_text() == "one"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def write(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise error

    with pytest.raises(error):
        written_once(tmp_path, "name", write)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks"]
    assert written_once(tmp_path, "name", _writes("whole", [])).read_text() == "whole"


def test_leftovers_go_unless_their_writer_lives(tmp_path):
    for name in ("dead", "name", "living.arrow"):
        (tmp_path / f"{name}.0123.tmp").mkdir(parents=True)
    (tmp_path / "file.arrow.0123.tmp").touch()
    with _lock(tmp_path, "living.arrow"):
        written_once(tmp_path, "name", _writes("", []))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".locks", "living.arrow.0123.tmp", "name"]


def _lock(root: Path, name: str) -> FileLock:
    (root / ".locks").mkdir(exist_ok=True)
    return FileLock(root / ".locks" / name, blocking=False)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/in cannot be written \(Not a directory\): .*give"):
        written_once(tmp_path / "file" / "in", "name", _writes("", []))


def test_a_lock_is_not_inherited(tmp_path):
    """A child that is forked while its parent writes does not keep others waiting."""
    with _lock(tmp_path, "name"):
        child = os.fork()
        if child == 0:
            time.sleep(2 * TIME_LIMIT)
            os._exit(0)
    try:
        _until(lambda: _is_free(tmp_path))  # the child lives for longer
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _is_free(root: Path) -> bool:
    try:
        with _lock(root, "name"):
            return True
    except Timeout:
        return False
