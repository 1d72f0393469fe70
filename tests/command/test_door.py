"""The command `dschat`: what it starts, how it says that it cannot, and how a wheel holds it."""

import os
import signal
import subprocess
import sys
import venv
from distutils.core import run_setup
from pathlib import Path

import pytest

import dschat
from dschat.command.door import choose
from dschat.command.registry import COMMANDS, by_group
from dschat.errors import UserError
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_has_a_program_and_a_place_in_the_help(capsys):
    listed = [command.name for _, commands in by_group() for command in commands]
    assert listed == [*COMMANDS]
    assert all(command.file is None or command.file.is_file() for command in COMMANDS.values())
    assert choose(["--help"]) is None
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said and len(name) < 12 for name in COMMANDS)
    assert max(map(len, said.splitlines())) <= 80


def test_a_mistyped_command_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown command rewrad; did you mean reward\?"):
        choose(["rewrad"])
    with pytest.raises(UserError, match="unknown command xyz; see dschat --help"):
        choose(["xyz"])


def test_the_version(capsys):
    assert choose(["--version"]) is None
    assert capsys.readouterr().out == f"dschat {dschat.__version__}\n"


def test_the_wheel_has_the_command_and_every_program(monkeypatch):
    monkeypatch.chdir(ROOT)
    built = run_setup("setup.py", stop_after="init")
    assert built.entry_points == {"console_scripts": ["dschat = dschat.__main__:main"]}
    for command in COMMANDS.values():
        if command.file is not None:
            package, _, _ = f"dschat.programs.{command.program}".rpartition("/")
            assert built.package_dir[package.replace("/", ".")] == str(Path(command.program).parent)
            assert package.replace("/", ".") in built.packages


@pytest.mark.slow
def test_a_wheel_runs_from_anywhere(tmp_path: Path):
    """Built, installed into a fresh environment that borrows the dependencies, and called."""
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    tree = tmp_path / "tree"
    names = ("setup.py", "pyproject.toml", "LICENSE", "dschat", "training", "inference")
    tree.mkdir()
    for name in names:  # building writes beside the sources
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree)], check=True, timeout=TIME_LIMIT)
    subprocess.run([*wheel, "-w", str(tmp_path), str(tree)], check=True, timeout=TIME_LIMIT)
    (packed,) = tmp_path.glob("dschat-*.whl")
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "borrowed.pth").write_text(str(Path(pytest.__file__).parents[1]))
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install"]
    subprocess.run([*install, "-q", "--no-deps", str(packed)], check=True, timeout=TIME_LIMIT)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words: str) -> subprocess.CompletedProcess:
        command = [str(home / "bin" / "dschat"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
        )

    assert call("--version").stdout == f"dschat {dschat.__version__}\n"
    for name in COMMANDS:
        assert call(name, "--help").returncode == 0, name
    wrong = call("chat", "--path", "./none")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: ")


def test_ctrl_c_before_the_first_import_is_no_traceback():
    """Later ones have handlers of their own; these come in the first tenths of a second."""
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "dschat.command.door":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from dschat.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout + done.stderr) == (-signal.SIGINT, "")
