"""No rank waits for another one without end or word: one line, from one rank, and an exit code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.steps import free_port, launch

WAITED = "waited 15 s for rank"
HERE = "in an all-reduce of step 4"
SILENT = "(no sign of life); the run ends"
STILL = "(still in the work after a barrier of step 4); the run ends"
STUCK = "was stuck for 15 s in the work of rank 0 of step 4; the run ends"
# case → exit code of each rank (None: stopped), and the only line that any of them prints
ENDS = {
    "fine": ([0, 0], None),
    "killed": ([1, -9], f"rank 0 lost rank 1 {HERE}; the run ends"),
    "first killed": ([-9, 1], f"rank 1 lost rank 0 {HERE}; the run ends"),
    "one of three killed": ([1, 1, -9], f"rank 0 lost rank 2 {HERE}; the run ends"),
    "killed at the end": (
        [-9, 1],
        "rank 1 lost rank 0 in the last barrier of step 4; the run ends",
    ),
    "stopped": ([1, None], f"rank 0 {WAITED} 1 {HERE} {SILENT}"),
    "first stopped": ([None, 1], f"rank 1 {WAITED} 0 {HERE} {SILENT}"),
    "hangs": ([1, 1], f"rank 0 {WAITED} 1 {HERE} {STILL}"),
    "one of three hangs": ([1, 1, 1], f"rank 0 {WAITED} 1 {HERE} {STILL}"),
    "long work of rank 0": ([0, 0], None),
    "stopped in work of rank 0": (
        [None, 1],
        f"rank 1 {WAITED} 0 in the work of rank 0 of step 4 {SILENT}",
    ),
    "stuck in work of rank 0": ([1, 1], f"rank 0 {STUCK}"),
    "stuck in other work of rank 0": ([1, 1], f"rank 0 {STUCK}"),
    "stuck on a file": ([1, 1], "rank * 15 s * of step 4 *; the run ends"),  # either may say it
    "own error": ([2, 2], "a reason of rank 0"),
    "own error of another": ([2, 2, 2], "a reason of rank 2"),
    "own error, then the launcher": ([2, 2], "a reason of rank 1"),
    "one signalled": ([75, 75], None),  # of which a line tells, without `error:`
    "first signalled": ([75, 75], None),
    "never comes": ([1], "rank 0 of 2 waited 15 s at 127.0.0.1:* for the others to start *"),
    "first never comes": ([1], "rank 1 of 2 waited 15 s at 127.0.0.1:* for the others to start *"),
}


# As a program, which guards the terminal before it imports torch.
START = (
    "import runpy, sys; from dschat.utils.printable import guard_terminal; guard_terminal(); "
    "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    folder = tmp_path_factory.mktemp("watch")
    worker = Path(__file__).with_name("watch_worker.py")
    done = launch([sys.executable, "-c", START, str(worker), str(folder)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDS)
def test_how_it_ends(results, case: str):
    codes, line = ENDS[case]
    printed = "".join(text for _, text in results[case].values())
    assert "Traceback" not in printed and "Exception raised" not in printed  # by torch's C++
    lines = [text for text in printed.splitlines() if text.startswith("error: ")]
    assert [code for code, _ in results[case].values()] == codes, printed
    if line is None:
        assert lines == []
        return
    (told,) = lines
    first, *parts = f"error: {line}".split("*")
    assert told.startswith(first) and all(part in told for part in parts), told


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again(tmp_path: Path):
    """By itself torch gives them the addresses of the ranks before, in a store that lives on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("restart_worker.py")
    options = ["--max-restarts", "1", "--master_port", free_port()]
    done = launch([*torchrun, *options, str(worker)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(re.findall(r"start \d rank \d sum \d", done.stdout))
    assert told == [f"start {start} rank {rank} sum 2" for start in (0, 1) for rank in (0, 1)]
