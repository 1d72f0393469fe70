"""One writer at a time, whole or nothing: several runs, killed ones, edited files, full disks."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout

import dschat.data.datasets
from dschat.data import tokenise
from dschat.data.cache import damage_of, open_folder, written_once
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
    dschat.data.datasets._check_room = lambda *args: None  # which tokenises some rows first
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
    assert len(list((folder / "sources").iterdir())) == 1
    assert list((folder / "sets").iterdir()) == []
    assert _end(_start(source, folder, workers), folder).endswith(f" {ROWS * 9 // 10}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_of_the_disk_that_a_library_wraps_is_the_same_line(tmp_path, code):
    """As `datasets` does where the end of a file does not fit."""

    def write(folder: Path) -> None:
        (folder / "part").write_text("begun")
        raise RuntimeError(f"cannot finish: {os.strerror(code)}")

    with pytest.raises(UserError, match=rf"{tmp_path} cannot be written \({os.strerror(code)}\)"):
        written_once(tmp_path, "kind", "key", write)
    assert list((tmp_path / "kind").iterdir()) == []


def _writes(text: str, seen: list[str]):
    def write(folder: Path) -> None:
        seen.append(text)
        (folder / "text").write_text(text)

    return write


def _keep(root: Path, key: str, text: str, seen: list[str] | None = None) -> str:
    """The text of a set that is kept under the key, or made of this text."""
    root.mkdir(exist_ok=True)
    seen = [] if seen is None else seen
    return (written_once(root, "kind", key, _writes(text, seen)) / "text").read_text()


def test_what_is_there_is_not_written_again(tmp_path):
    seen: list[str] = []
    for text in ("one", "two"):
        assert _keep(tmp_path / "deep", "key", text, seen) == "one"
    assert seen == ["one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    with pytest.raises(error):
        written_once(tmp_path, "kind", "key", write)
    assert list((tmp_path / "kind").iterdir()) == []
    assert _keep(tmp_path, "key", "whole") == "whole"


def test_leftovers_go_unless_their_writer_lives(tmp_path):
    for name in ("dead", "key", "living"):
        (tmp_path / "kind" / f"{name}.0123.tmp").mkdir(parents=True)
    (tmp_path / "kind" / "file.0123.tmp").touch()
    with _lock(tmp_path, "kind-living"):
        _keep(tmp_path, "key", "")
    left = sorted(p.name for p in (tmp_path / "kind").iterdir())
    assert left == ["key", "living.0123.tmp"]


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


RECORD = "digests.json"
DAMAGE = {
    "flip": (lambda s: _flip(s / "text"), "text is damaged"),
    "cut": (lambda s: (s / "text").write_bytes(b"on"), "text is damaged"),
    "emptied": (lambda s: (s / "text").write_bytes(b""), "text is damaged"),
    "removed": (lambda s: (s / "text").unlink(), "text is missing"),
    "added": (lambda s: (s / "train-9.arrow").touch(), "train-9.arrow is not of it"),
    "a folder": (lambda s: ((s / "text").unlink(), (s / "text").mkdir()), "text is missing"),
    "a pipe": (lambda s: ((s / "text").unlink(), os.mkfifo(s / "text")), "text: is a pipe or a"),
    "a pipe as record": (
        lambda s: ((s / RECORD).unlink(), os.mkfifo(s / RECORD)),
        f"{RECORD} is missing or damaged",
    ),
    "no record": (lambda s: (s / RECORD).unlink(), f"{RECORD} is missing or damaged"),
    "record": (lambda s: (s / RECORD).write_text("[1]"), f"{RECORD} is missing or damaged"),
    "list": (
        lambda s: (s / RECORD).write_text('{"key": "key", "files": 3}'),
        f"{RECORD} is missing or damaged",
    ),
    "another": (lambda s: shutil.copytree(s.parent / "b", s, dirs_exist_ok=True), "another set"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_set_is_said_and_made_again(name, tmp_path, capsys):
    spoil, said = DAMAGE[name]
    _keep(tmp_path, "b", "other ids")
    assert _keep(tmp_path, "key", "one") == "one"
    spoil(tmp_path / "kind" / "key")
    assert _keep(tmp_path, "key", "one") == "one"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/kind/key: ") and said in line and "made again" in line
    assert damage_of(tmp_path / "kind" / "key") is None
    assert _keep(tmp_path, "key", "two") == "one" and not capsys.readouterr().out


@pytest.mark.slow
def test_a_bit_of_every_file_is_found_and_healed(write_rows, tmp_path, tiny_tokenizer, capsys):
    rows = [{"prompt": f"hi {n}", "chosen": f" we {n}", "rejected": ""} for n in range(40)]
    folder = tmp_path / "cache"
    spec = Spec(data_path=(write_rows(rows),), data_output_path=str(folder), max_seq_len=64)
    whole = spec.make(tiny_tokenizer, 1).train.to_list()
    files = [f for f in folder.rglob("*") if f.is_file() and ".locks" not in f.parts]
    assert {f.name for f in files} >= {"rows.arrow", "skipped.json", "train-000.arrow", RECORD}
    for file in files:
        size = file.stat().st_size
        for at in (0, size // 2, size - 1):
            _flip(file, at)
            assert spec.make(tiny_tokenizer, 1).train.to_list() == whole
            assert "it is made again" in capsys.readouterr().out, (file, at)
            assert [damage_of(s) for s in (file.parent,)] == [None]
    assert spec.make(tiny_tokenizer, 1).train.to_list() == whole
    assert "made again" not in capsys.readouterr().out


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    rename, fsync = Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(_path_of(fd)), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    _keep(tmp_path, "key", "one")
    names = [call if call == "rename" else Path(call).name.split(".")[0] for call in calls]
    assert names == ["text", "digests", "key", "rename", "kind"]


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_by_default_it_is_the_users_alone(tmp_path, monkeypatch, write_rows, tiny_tokenizer):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    rows = [{"prompt": f"hi {n}", "chosen": f" we {n}", "rejected": ""} for n in range(9)]
    spec = Spec(data_path=(write_rows(rows),), max_seq_len=64)
    spec.make(tiny_tokenizer, 1)
    home = tmp_path / "xdg" / "dschat"
    everything = [home, *home.rglob("*")]
    assert {_mode(p) for p in everything if p.is_dir()} == {0o700}
    assert {_mode(p) for p in everything if p.is_file()} == {0o600}
    assert len(list((home / "sets").iterdir())) == 1
    home.chmod(0o755)  # of an earlier version
    assert open_folder() == home and _mode(home) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_folder() == tmp_path / "home" / ".cache" / "dschat"


def _as_if(monkeypatch, folder: Path, **status: int) -> None:
    """Give the folder another owner or group, and this process an id that is not root's."""
    real = Path.stat

    def stat_of(path: Path, **options):
        found = real(path, **options)
        if path != folder:
            return found
        entries = {"st_mode": found.st_mode, "st_uid": 1000, "st_gid": 1000} | status
        return SimpleNamespace(**entries)

    monkeypatch.setattr(Path, "stat", stat_of)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [1000, 50])


FOLDER = stat.S_IFDIR
# What the folder's status is, and why it is refused as the user's choice, and as the default.
OWNERS = {
    "own": ({"st_mode": FOLDER | 0o700}, None, None),
    "root's": ({"st_uid": 0, "st_mode": FOLDER | 0o755}, None, None),
    "a stranger's": (
        {"st_uid": 7, "st_mode": FOLDER | 0o755},
        *(2 * ["belongs to another user (7)"]),
    ),
    "for all": ({"st_mode": FOLDER | 0o1777}, *(2 * ["may be written by others (mode 1777)"])),
    "a group's": (
        {"st_uid": 7, "st_gid": 50, "st_mode": FOLDER | 0o2770},
        None,
        "belongs to another user (7)",
    ),
    "another group's": (
        {"st_uid": 7, "st_gid": 51, "st_mode": FOLDER | 0o2770},
        *(2 * ["belongs to another user"]),
    ),
    "own, for the group": (
        {"st_mode": FOLDER | 0o770},
        None,
        "may be written by others (mode 0770)",
    ),
}


@pytest.mark.parametrize("name", OWNERS)
def test_no_stranger_decides_which_rows_train(name, tmp_path, monkeypatch):
    status, chosen, default = OWNERS[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "dschat"
    folder.mkdir()
    _as_if(monkeypatch, folder, **status)
    for path, problem in ((str(folder), chosen), (None, default)):
        if problem is None:
            assert open_folder(path) == folder
            continue
        with pytest.raises(UserError) as error:
            open_folder(path)
        assert str(error.value).startswith(f"{folder}: {problem}"), name
        assert "give another data_output_path" in str(error.value)


def test_what_is_made_is_as_open_as_the_folder(tmp_path):
    """So that all of a group that shares it can read, lock and replace what is there."""
    tmp_path.chmod(0o2775)
    before = os.umask(0o077)
    try:
        _keep(tmp_path, "key", "one")
    finally:
        os.umask(before)
    kept = tmp_path / "kind" / "key"
    assert [_mode(p) for p in (tmp_path / "kind", kept)] == [0o2775, 0o2775]
    assert [_mode(kept / name) for name in ("text", RECORD)] == [0o664, 0o664]
    assert _mode(tmp_path / ".locks" / "kind-key") == 0o664
    folder = open_folder(str(tmp_path / "new" / "one"))
    assert _mode(folder) & 0o002 == 0


def _lock(root: Path, name: str) -> FileLock:
    (root / ".locks").mkdir(exist_ok=True)
    return FileLock(root / ".locks" / name, blocking=False)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/in cannot be written \(Not a directory\): .*give"):
        open_folder(str(tmp_path / "file" / "in"))
    with pytest.raises(UserError, match=r"file/in cannot be written \(Not a directory\): .*give"):
        written_once(tmp_path / "file" / "in", "kind", "key", _writes("", []))


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
