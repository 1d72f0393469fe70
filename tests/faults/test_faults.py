"""Runs that are killed, filled up, stopped and damaged end as runs that nothing happened to.

Some cases of each kind; `make faults` tries hundreds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import library
from tests.faults.cases import middle_form

ROOT = Path(__file__).resolve().parents[2]
CASES = [case.name for case in middle_form()]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.compiler() is None, reason="no C compiler on this system"),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All cases in one process, which imports torch once."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--middle", "--folder", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = (folder / "results.jsonl").read_text().splitlines()
    found = {verdict["case"]: verdict for verdict in map(json.loads, lines)}
    assert found.keys() == {*CASES}, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_and_one_line_says_what_happened(verdicts, case):
    verdict = verdicts[case]
    assert verdict["complaints"] == []
    assert verdict["faults"] >= 1  # it did take place
