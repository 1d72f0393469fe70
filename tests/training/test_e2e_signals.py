"""e2e_rlhf.py stopped by a signal, resumed inside its step, and killed: no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT, TIME_LIMIT
from tests.helpers.steps import LAUNCHER_VARIABLES
from tests.train.test_launch import wait_for_end


def start(folder: Path, *argv: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    argv = ("--step", "1", "--num-train-epochs", "1", *argv, "--output-dir", str(folder / "out"))
    with (folder / "printed").open("w") as file:
        command = [sys.executable, str(ROOT / "e2e_rlhf.py"), *argv]
        return subprocess.Popen(command, env=env, stdout=file, stderr=file)


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not is_true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_stopped_resumed_and_killed(tmp_path: Path):
    printed, step = tmp_path / "printed", tmp_path / "out" / "actor-models"
    e2e = start(tmp_path)
    wait_until(
        lambda: (
            (step / "metrics.jsonl").exists()
            and (step / "metrics.jsonl").read_bytes().count(b"\n") > 1
        ),
        e2e,
    )
    children = psutil.Process(e2e.pid).children(recursive=True)
    below = [child.pid for child in children]
    forked = [child for child in children if "dschat.train.fork_server" in child.cmdline()]
    assert len(forked) == 2  # the server and, through the script, the step
    e2e.send_signal(signal.SIGTERM)
    assert e2e.wait(TIME_LIMIT) == 75
    wait_for_end(below)
    text = printed.read_text()
    (saved,) = (step / "checkpoints").iterdir()
    number = int(saved.name.removeprefix("step-"))
    lines = [line for line in text.splitlines() if line.startswith("stopped by")]
    assert lines == [
        f"stopped by SIGTERM after step {number}: saved in {saved}, go on with the same command "
        "and --resume"
    ]
    assert text.splitlines()[-1] == lines[0] and "Traceback" not in text

    e2e = start(tmp_path, "--resume", "--save-steps", "5")
    wait_until(lambda: f"resumed from {saved} at step {number}\n" in printed.read_text(), e2e)
    wait_until(lambda: len(list((step / "checkpoints").glob("step-*5"))) > 0, e2e)
    below = [child.pid for child in psutil.Process(e2e.pid).children(recursive=True)]
    assert len(below) >= 3  # the script, the launcher in its place, main.py, and who watches
    e2e.kill()
    e2e.wait()
    wait_for_end(below)
