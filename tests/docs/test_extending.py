"""The diffs of docs/extending.md apply to a copy of the tree, and their own tests pass there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
# Section by section, each with one diff.
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$", PAGE, re.M | re.S))
PATHS = {name: re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M) for name, diff in DIFFS.items()}
TESTS = [path for paths in PATHS.values() for path in paths if path.startswith("tests/")]
OWN_TEST = re.compile(r"^(?:PASSED|FAILED|ERROR) (tests/\S+?\.py)", re.M)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Copy the sources and apply every diff, one after the other."""
    tree = tmp_path_factory.mktemp("extended") / "tree"
    tree.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "output*")
    for name in ("dschat", "training", "tests", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copy if source.is_file() else lambda a, b: shutil.copytree(a, b, ignore=leave)
        copy(source, tree / name)
    for name, diff in DIFFS.items():
        apply = subprocess.run(
            ["git", "apply", "-C1", "-"], cwd=tree, input=diff, capture_output=True, text=True
        )
        assert apply.returncode == 0, f"{name}: {apply.stderr}"
    return tree


@pytest.fixture(scope="module")
def report(tree: Path) -> subprocess.CompletedProcess:
    """Run the tests of all diffs in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *TESTS]
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
    )


def test_every_section_that_adds_something_shows_it():
    assert [name for name in re.findall(r"^## (.+)$", PAGE, re.M)] == list(DIFFS)


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_comes_with_its_test_and_touches_little(name: str):
    own = [path for path in PATHS[name] if path.startswith("tests/")]
    library = [path for path in PATHS[name] if path.startswith("dschat/")]
    assert len(own) == 1
    assert len(library) <= 2


@pytest.mark.slow
def test_the_tests_of_the_diffs_pass(report: subprocess.CompletedProcess):
    assert report.returncode == 0, report.stdout[-4000:] + report.stderr[-2000:]
    assert set(OWN_TEST.findall(report.stdout)) == set(TESTS)


def test_the_copy_is_what_ran(tree: Path):
    code = "import dschat; print(dschat.__file__)"
    env = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(tree)
