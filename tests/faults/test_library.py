"""The preloaded library and the forked runs, on a toy program in place of a training run."""

import errno
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import library
from tests.faults.library import Aim
from tests.faults.sites import Call, draw_site, published, read_trace, sites_of

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C compiler on this system")

# Writes as Python, C++ and a plain system call do; then says what it could not do.
WRITER = """
import ctypes, os, pathlib, shutil, sys
pathlib.Path("out").mkdir()
with open("out/a.txt", "w") as file:
    file.write("0123456789")
shutil.copyfile("out/a.txt", "out/b.txt")
os.rename("out/b.txt", "out/c.txt")
libc = ctypes.CDLL(None, use_errno=True)
libc.renameat2(-100, b"out/a.txt", -100, b"out/c.txt", 2)
with open("out/c.txt", "rb+") as file:
    file.truncate(3)
    os.fsync(file.fileno())
shutil.rmtree("out")
"""
DRIVER = """
import json, os, sys
from pathlib import Path
from tests.faults import library
from tests.faults.library import Aim
folder, aims = Path(sys.argv[1]), json.loads(sys.argv[2])
for number, aim in enumerate(aims):
    place = folder / str(number)
    place.mkdir()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(place)
        trace = os.open(folder / f"trace-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        library.arm(place, Aim(**aim), trace)
        try:
            exec(Path(sys.argv[3]).read_text())
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / f"code-{number}").write_text(str(status))
"""
AIMS = (
    Aim(),
    Aim("kill", "rename out/c.txt", 1),
    Aim("torn", "rename out/c.txt", 2),
    Aim("torn", "write out/a.txt"),
    Aim("error", "open out/*", 2, errno.ENOSPC),
    Aim("signal", "fsync out/*", 1, 15),
    Aim("error", "*", 7, errno.EROFS),
)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpose")
    built = library.build(folder)
    (folder / "writer.py").write_text(WRITER)
    aims = json.dumps([vars(aim) for aim in AIMS])
    command = [sys.executable, "-c", DRIVER, str(folder), aims, str(folder / "writer.py")]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, env=library.preloaded(built), cwd=root, check=True)
    return folder


def code(folder: Path, number: int) -> int:
    return int((folder / f"code-{number}").read_text())


def test_every_way_to_change_the_disk_is_counted(tried):
    calls = read_trace(tried / "trace-0")
    assert code(tried, 0) == 0 and [c.number for c in calls] == [*range(1, len(calls) + 1)]
    steps = [f"{c.operation} {c.path}" for c in calls if c.operation not in ("chmod", "sendfile")]
    steps, removed = steps[:9], steps[9:]
    assert steps == [
        *("mkdir out", "open out/a.txt", "write out/a.txt", "open out/b.txt"),
        *("rename out/c.txt", "rename out/c.txt", "open out/c.txt", "ftruncate out/c.txt"),
        "fsync out/c.txt",
    ]
    assert sorted(removed) == ["rmdir out", "unlink out/a.txt", "unlink out/c.txt"]
    copied = [c.size for c in calls if c.operation in ("sendfile", "copy_file_range")]
    assert copied and [c.size for c in calls if c.operation == "write"] == [10]


def test_a_kill_comes_before_the_call_and_a_torn_one_after_half_of_it(tried):
    assert [code(tried, number) for number in (1, 2, 3)] == [-9, -9, -9]
    assert sorted(p.name for p in (tried / "1/out").iterdir()) == ["a.txt", "b.txt"]
    assert sorted(p.name for p in (tried / "2/out").iterdir()) == ["a.txt", "c.txt"]
    assert (tried / "3/out/a.txt").read_text() == "01234"  # half of ten
    assert [c.is_aim for c in read_trace(tried / "trace-2")][-1]


def test_errors_stay_from_the_call_on(tried):
    assert code(tried, 4) == errno.ENOSPC and not (tried / "4/out/b.txt").exists()
    assert (tried / "4/out/a.txt").read_text() == "0123456789"
    assert code(tried, 6) == errno.EROFS and (tried / "6/out").exists()


def test_a_signal_comes_amid_a_call(tried):
    assert code(tried, 5) == -15 and (tried / "5/out/c.txt").read_text() == "012"


def test_a_site_matches_the_same_call_of_another_run():
    def call(operation: str, path: str) -> Call:
        return Call(1, operation, path, 0, False)

    part = call("write", "out/checkpoints/.step-000012.tmp/model/mp_rank_00_model_states.pt")
    assert part.site == "write out/checkpoints/.step-*.tmp/model/mp_rank_00_model_states.pt"
    assert (
        call("open", "cache/1f2e3d4c5b.0a1b2c3d.tmp/tmpa_1b2c3d").site == "open cache/*.*.tmp/tmp*"
    )
    assert sites_of([part, part, call("rename", "out")]) == {part.site: 2, "rename out": 1}


def test_rare_calls_are_drawn_as_often_as_frequent_ones():
    draws = [draw_site(random.Random(n), {"write a": 500, "rename b": 1}) for n in range(200)]
    renames = [at for site, at in draws if site == "rename b"]
    assert 70 < len(renames) < 130 and set(renames) == {1}
    assert max(at for _, at in draws) > 300


def test_the_newest_checkpoint_that_got_its_name():
    def rename(step: int, is_aim: bool = False) -> Call:
        return Call(step, "rename", f"out/checkpoints/step-{step:06d}", 0, is_aim)

    assert published([rename(3), rename(6), rename(9, is_aim=True)]) == 6
    assert published([]) == 0
