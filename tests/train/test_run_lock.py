"""One process holds an output folder; who else wants it is told who."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dschat.errors import UserError
from dschat.train import run_lock
from tests.helpers.launch import ROOT

HOLD = "import sys, time; from dschat.train import run_lock; run_lock.hold(sys.argv[1]); "


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = HOLD + "print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(UserError) as error:
        run_lock.hold(tmp_path / ".." / tmp_path.name)
    assert str(error.value).endswith(
        f": process {holder.pid} on {socket.gethostname()} writes there; wait for its end, stop "
        "it, or give another output_dir"
    )
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()  # and locks nobody out
    run_lock.hold(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    run_lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_does_not_keep_the_lock(tmp_path):
    code = HOLD + "import os; pid = os.fork(); pid or time.sleep(600); print(pid, flush=True)\n"
    code += "os._exit(0)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.wait()
        try:
            run_lock.hold(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)
            run_lock.release()


def test_a_folder_is_held_until_it_is_released(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        run_lock.hold(folder)
    run_lock.hold(one)  # once more, by the same process
    with run_lock.released_after(one):
        pass
    assert [(path / ".lock").exists() for path in (one, other)] == [False, True]
    one.rename(tmp_path / "moved")
    run_lock.release()
    assert list(other.iterdir()) == []


def test_a_removed_lock_file_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Its holder has removed it after this process opened it, and before it locked it."""
    original, opened = run_lock.fcntl.lockf, []

    def lockf(file, how):
        original(file, how)
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(os.fstat(file.fileno()).st_ino)

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    run_lock.hold(tmp_path)
    assert len(opened) == 2 and (tmp_path / ".lock").exists()
    run_lock.release()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    """In a folder of a stranger's, a link would have another file emptied."""
    lock, mine = tmp_path / run_lock.NAME, tmp_path / "mine"
    mine.write_text("mine")
    make = {"link": lambda: lock.symlink_to(mine), "pipe": lambda: os.mkfifo(lock)}
    make.get(kind, lock.mkdir)()
    with pytest.raises(UserError, match=r"\.lock is no file; remove it"):
        run_lock.hold(tmp_path)
    with pytest.raises(OSError):
        run_lock._no_link(str(lock), os.O_WRONLY | os.O_NONBLOCK)
    assert mine.read_text() == "mine" and run_lock.held() == []


@pytest.mark.parametrize("left", ["process 1 on here", "process 7 on elsewhere", "own", "\x1b"])
def test_a_file_that_names_any_process_keeps_nobody_out(tmp_path, left):
    """It may be dead, of another host, or another one under its number: the lock counts."""
    left = f"process {os.getpid()} on here" if left == "own" else left
    (tmp_path / run_lock.NAME).write_text(left)
    run_lock.hold(tmp_path)
    assert (tmp_path / run_lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
    run_lock.release()


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    run_lock.hold(tmp_path)
    assert "its disk has no locks (No locks available)" in capsys.readouterr().out
    run_lock.release()


def test_a_disk_that_is_read_only_by_then_does_not_hide_why_the_run_ends(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    run_lock.hold(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        run_lock.release()
    assert (tmp_path / run_lock.NAME).exists()
    run_lock.hold(tmp_path)  # the file that stays holds nobody up
    run_lock.release()
