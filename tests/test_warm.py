"""A process that is forked from one with all imports is like a fresh one of the same command."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.launch import TIME_LIMIT

SCRIPT = """
import atexit, json, os, signal, sys, threading
facts = {"argv": sys.argv, "path": sys.path[:2], "folder": os.getcwd(), "input": sys.stdin.read()}
facts |= {"name": __name__, "RANK": os.environ.get("RANK"), "OTHER": os.environ.get("OTHER")}
facts |= {"int": signal.getsignal(signal.SIGINT) is signal.default_int_handler}
facts |= {"files": len(os.listdir("/dev/fd")), "threads": threading.active_count()}
print(json.dumps(facts), flush=True)
atexit.register(print, "at exit")
if sys.argv[1] == "exits":
    sys.exit("no luck")
if sys.argv[1] == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fails":
    {}[7]
"""
DRAWS = "import numpy, random; print(numpy.random.rand(), random.random(), hash('a'))"


def run(folder: Path, argv: list[str], number: int = 0, **env: str) -> tuple:
    """What it is, prints, says and ends with."""
    files = [folder / name for name in ("out", "err")]
    with files[0].open("w") as out, files[1].open("w") as err:
        variables = warm.VARIABLES | env
        process = warm.start(argv, folder, variables, out, err, number)
        code = process.wait(timeout=TIME_LIMIT)
    return type(process), *(file.read_text() for file in files), code


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="forks are for Linux")
def test_it_starts_and_ends_as_a_fresh_process_does(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for how, code in {"works": 0, "exits": 1, "interrupted": -2, "killed": -9, "fails": 1}.items():
        kind, out, err, ended = run(tmp_path, [str(script), how], RANK="3")
        fresh, *others = run(tmp_path, [str(script), how], RANK="3", OTHER="x")
        assert (kind, fresh) == (warm.Forked, subprocess.Popen)
        first, *rest = out.splitlines()
        expected, *same = others[0].splitlines()
        assert json.loads(first) | {"OTHER": "x"} == json.loads(expected)
        assert rest == same == ([] if how == "killed" else ["at exit"])
        assert err.splitlines()[-2:] == others[1].splitlines()[-2:]
        assert ended == others[2] == code


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="forks are for Linux")
def test_each_draws_its_own_numbers(tmp_path: Path):
    """And ranks side by side have other hash seeds."""
    script = tmp_path / "draws.py"
    script.write_text(DRAWS)
    first, second, other = (run(tmp_path, [str(script)], n)[1].split() for n in (0, 0, 1))
    assert first[0] != second[0] and first[1] != second[1]
    assert first[2] == second[2] != other[2]


def test_what_a_test_sets_is_not_shared():
    """Packages may read any variable when they are imported."""
    one = warm.VARIABLES | {"RANK": "1", "PYTEST_CURRENT_TEST": "this"}
    assert warm.shared(one) == warm.VARIABLES
    assert warm.shared(one | {"HF_HOME": "elsewhere"}) != warm.VARIABLES
