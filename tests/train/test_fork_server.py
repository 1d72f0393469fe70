"""Programs forked from a server: as if they had been started, only where they would be alike."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dschat.train import fork_server, launch
from tests.helpers.launch import ROOT, TIME_LIMIT
from tests.train.test_launch import wait_for_end

# What a program sees of its start, of its place among processes too; then what it is told to do.
PROGRAM = """
import atexit, json, os, signal, sys
from pathlib import Path
atexit.register(print, "at exit")
env = sorted(item for item in os.environ.items() if item[0] != "DSCHAT_CODE_FILE")
print(json.dumps([
    __name__, sys.modules["__main__"].__file__, sys.argv, sys.path[0], os.getcwd(), env,
    sys.stdin.read(), sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.line_buffering,
    os.getpgid(0) == os.getpid(), [signal.getsignal(n) == signal.SIG_IGN for n in (1, 10, 15)],
]))
print("to stderr", file=sys.stderr)
print("parent", Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\\0")[2:3])
sys.stdout.flush()
exec(sys.argv[1])
"""
FORKED = "parent [b'dschat.train.fork_server']"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "main.py"
    file.write_text(PROGRAM)
    return file


@pytest.fixture(scope="module", autouse=True)
def server(program: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("PYTEST_CURRENT_TEST")  # of each test anew
        # Which imports of the server set; a step started as usual has it from the pipeline.
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        with fork_server.running(["json"], [program]):
            yield


def environ() -> dict[str, str]:
    return {name: os.environ[name] for name in os.environ if name != "PYTEST_CURRENT_TEST"}


def run(command: list[str], folder: Path) -> tuple[int, list[str]]:
    """Run under `train.launch`; returns the exit code and the lines of the log."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    code = launch.run(command, log, environ())
    return code, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("pass", 0, "at exit"),
        ("sys.exit(7)", 7, "at exit"),
        ("sys.exit('why')", 1, "at exit"),
        ("1 / 0", 1, "at exit"),
        ("os.kill(os.getpid(), 9)", 137, FORKED),
        ("os._exit(3)", 3, FORKED),
    ],
)
def test_a_fork_is_what_a_start_would_be(
    end: str, code: int, last: str, program: Path, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSCHAT_WINDOW", "71")  # not the server's
    command = [sys.executable, str(program), end, "--flag", "ü"]
    ended, forked = run(command, tmp_path)
    assert (ended, forked[-1]) == (code, last) and FORKED in forked
    with monkeypatch.context() as patch:
        patch.setattr(fork_server, "fork", lambda *_: None)
        ended, usual = run(command, tmp_path)
    assert ended == code and FORKED not in usual
    # Above what the program raised, its traceback has what ran it.
    told = {line for line in forked if not line.startswith((" ", "parent", "Traceback"))}
    assert told == {line for line in usual if not line.startswith((" ", "parent", "Traceback"))}


def test_through_a_shell(program: Path, tmp_path: Path, monkeypatch):
    """As scripts start a step: a shell changes variables, `python` is found on its PATH."""
    monkeypatch.setenv("PS1", "$ ")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    words = ["python", "-m", "dschat.train.launch", "--log", str(tmp_path / "log")]
    script = shlex.join([*words, "python", str(program), "pass"])
    subprocess.run(["bash", "-c", f"exec {script}"], check=True, env=environ(), timeout=TIME_LIMIT)
    assert FORKED in (tmp_path / "log").read_text()


def test_a_command_of_dschat(tmp_path: Path):
    code, lines = run([sys.executable, "-m", "dschat", "sfd"], tmp_path)
    assert (code, lines) == (2, ["error: unknown command sfd; did you mean sft?"])


@pytest.mark.parametrize("case", ["another variable", "a module", "a file", "verbose", "a shell"])
def test_what_would_be_another_process_starts_as_usual(
    case: str, program: Path, tmp_path: Path, monkeypatch
):
    command, code = [sys.executable, str(program), "pass"], 0
    if case == "another variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "37")
    elif case == "verbose":
        command.append("--verbose")
    elif case == "a file":
        other = tmp_path / "main.py"
        other.write_text(PROGRAM)
        command[1] = str(other)
    elif case == "a module":
        command = [sys.executable, "-m", "this"]
    else:
        command, code = ["sh", "-c", "exit 5"], 5
    assert fork_server.fork(command, environ()) is None
    ended, lines = run(command, tmp_path)
    assert ended == code and FORKED not in lines


def test_without_a_server_all_starts_as_usual(program: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(fork_server.SOCKET, str(tmp_path / "gone"))
    command = [sys.executable, str(program), "sys.exit(7)"]
    assert fork_server.fork(command, environ()) is None
    assert run(command, tmp_path)[0] == 7
    (deep := tmp_path / ("x" * 200)).mkdir()  # too long a name for a socket's
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with fork_server.running([]):
        assert run(command, tmp_path)[0] == 7


def test_it_ends_with_its_pipeline(tmp_path: Path):
    code = (
        "import os, sys; from dschat.train import fork_server, launch\n"
        "step = [sys.executable, sys.argv[1], 'print(os.getpid(), flush=True); signal.pause()']\n"
        "with fork_server.running(['json'], [sys.argv[1]]):\n"
        "    launch.run(step, sys.argv[2])\n"
    )
    program = tmp_path / "main.py"
    program.write_text(PROGRAM)
    pipeline = subprocess.Popen(
        [sys.executable, "-c", code, str(program), str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    assert pipeline.stdout is not None
    while not (line := pipeline.stdout.readline().strip()).isdigit():
        assert line
    below = [child.pid for child in psutil.Process(pipeline.pid).children(recursive=True)]
    assert int(line) in below and len(below) == 3  # the server, the step and its guard
    pipeline.kill()
    wait_for_end(below)
    pipeline.communicate()
