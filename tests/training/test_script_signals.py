"""A signal to a training script, to its shell alone or to all of it, stops the run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, TIME_LIMIT
from tests.helpers.shell import STEP1, TRAINING
from tests.helpers.tiers import tiers
from tests.train.test_launch import RANK, wait_for_end

SCRIPTS = {"one run": "single_node/run_1.3b.sh", "sweep": "single_node/sweep/run_step1_sweep.sh"}
TARGETS = {"shell": os.kill, "group": os.killpg}
CASES = [
    f"{signum}, {script}, {target}"
    for signum in ("SIGTERM", "SIGINT", "SIGUSR1")
    for script in SCRIPTS
    for target in TARGETS
]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("case", tiers(CASES, ["SIGTERM, one run, shell", "SIGINT, sweep, shell"]))
def test_a_signal_stops_the_run_and_the_script_returns_its_code(case: str, tmp_path: Path):
    name, script, target = case.split(", ")
    signum = signal.Signals[name]
    rank = tmp_path / "rank.py"
    rank.write_text(RANK)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"LAUNCHER": f"{sys.executable} {rank}", "PATH": path}
    env |= {"PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    command = [shutil.which("bash"), TRAINING / STEP1 / SCRIPTS[script]]
    command += ["out"] if script == "one run" else []  # a sweep has a folder for each
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
    deadline = time.monotonic() + TIME_LIMIT
    while not (pids := [line for line in lines_of(printed) if line.isdecimal()]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    TARGETS[target](process.pid, signum)
    assert process.wait(TIME_LIMIT) == 75
    wait_for_end([int(pids[0])])
    runs = [line for line in lines_of(printed) if not line.startswith("== run_single.sh")]
    assert runs == [pids[0], str(int(signum))]  # and no other run of a sweep
    (log,) = tmp_path.glob("*/training.log")
    assert lines_of(log) == runs
