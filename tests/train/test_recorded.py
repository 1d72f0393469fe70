"""What a step of each program allocates, and sends to another rank, is what the list says."""

import json
import tempfile
from pathlib import Path

import pytest

from tests.helpers.launch import run_ranks
from tests.train.recorded import COLLECTIVES, LIST, PROGRAMS, VOCABULARY, recorded

WORKER = Path(__file__).with_name("collectives_worker.py")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_allocates_what_is_listed(name):
    """After a wanted change: `python -m tests.train.recorded`."""
    assert recorded(name) == json.loads(LIST.read_text())[name]


def test_no_tensor_of_all_positions_and_the_vocabulary_is_listed():
    """Half of the positions are scored: the longest listed tensor has as many rows."""
    listed = json.loads(LIST.read_text())
    rows = {
        int(shape.split()[1].split("x")[0])
        for name in PROGRAMS
        for shape in listed[name]
        if shape.endswith(f"x{VOCABULARY}")
    }
    assert rows == {4 * 32 - 6, 2 * (4 * 32) - 10, 4 * 32}


def collectives(folder: Path) -> dict:
    """Calls and bytes of an optimizer step on two ranks, by ZeRO stage."""
    printed = run_ranks(WORKER, 2, [], folder)[0]
    (line,) = [line for line in printed.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def write_collectives() -> None:
    """Write them into the list anew, to be read in the diff."""
    listed = json.loads(LIST.read_text()) | {COLLECTIVES: collectives(Path(tempfile.mkdtemp()))}
    LIST.write_text(json.dumps(listed, indent=2) + "\n")


@pytest.mark.slow
def test_a_step_sends_what_is_listed(tmp_path: Path):
    assert collectives(tmp_path) == json.loads(LIST.read_text())[COLLECTIVES]
