"""Scripts that start others on several machines: Slurm's job, torchrun's, the hostfile, the image.

No cluster is here: `srun` is a program that starts two tasks and passes signals on, as srun does.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from dschat.train.signals import STOPPED
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.shell import ROOT, STEP1, TRAINING, fake_launchers, started
from tests.train.test_launch import RANK, wait_for_end
from tests.training.test_scripts import BASH

CLUSTER = TRAINING / "cluster"
SCRIPT = TRAINING / STEP1 / "multi_node/run_66b.sh"
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = open(os.environ["WORDS"], "w")
print(*sys.argv[1:], sep="\\n", file=words, flush=True)
rank = {RANK!r}
if os.environ["TASKS"] != "until a signal":
    rank = "raise SystemExit(" + os.environ["TASKS"] + ")"
tasks = [subprocess.Popen([sys.executable, "-c", rank]) for _ in range(2)]
pass_on = lambda signum, frame: [task.send_signal(signum) for task in tasks]
signal.signal(signal.SIGUSR1, pass_on)
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with `srun`, and `scontrol` that writes down its words."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n'}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("WORDS", str(folder / "words"))
    monkeypatch.delenv("LAUNCHER", raising=False)
    return folder


def submit(*words: str) -> subprocess.Popen:
    """The job's script with this command, as Slurm starts it."""
    pipe = subprocess.PIPE
    command = [BASH, str(CLUSTER / "slurm.sh"), *words]
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_a_job_that_reaches_its_time_limit_is_requeued(slurm: Path, tmp_path: Path, monkeypatch):
    """USR1 to the job's script alone: tasks end with 75 after their step, and so do all above."""
    monkeypatch.setenv("TASKS", "until a signal")
    job = submit("bash", str(SCRIPT), str(tmp_path / "out"), "3", "--save_steps", "200", "--resume")
    tasks = [int(job.stdout.readline()) for _ in range(2)]
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=TIME_LIMIT)
    assert job.returncode == STOPPED and out.split() == [str(int(signal.SIGUSR1))] * 2
    wait_for_end(tasks)
    assert (slurm / "scontrol.log").read_text() == "requeue 7\n"
    words = (slurm / "words").read_text().splitlines()
    assert words[:4] == ["--kill-on-bad-exit=1", "--gpu-bind=none", "python", words[3]]
    assert words[3].endswith("step1_supervised_finetuning/main.py")
    assert words[-3:] == ["--save_steps", "200", "--resume"]


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_has_ended_is_not_requeued(slurm: Path, tmp_path: Path, monkeypatch, code):
    monkeypatch.setenv("TASKS", str(code))
    job = submit("bash", str(SCRIPT), str(tmp_path / "out"))
    job.communicate(timeout=TIME_LIMIT)
    assert job.returncode == code and not (slurm / "scontrol.log").exists()


def test_what_slurm_is_asked_for():
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode append", "--signal B:USR1@300"} <= {*asked}
    # Slurm reads them up to the first command.
    first = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first
    assert {"--ntasks-per-node 8", "--gpus-per-node 8", "--nodes 2"} <= {*asked}


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_they_are_sound_bash_and_say_what_is_missing(script: Path):
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")
    done = subprocess.run([BASH, script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch(r"error: \S+: .*give .*\n", done.stderr)


def test_torchrun_on_each_machine(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)  # a process group of other tests sets it
    shell = fake_launchers(tmp_path, monkeypatch)
    torchrun = tmp_path / "bin/torchrun"
    torchrun.write_text((tmp_path / "bin/deepspeed").read_text())
    torchrun.chmod(0o755)
    words = ["2", "8", "node-1", str(SCRIPT), str(tmp_path / "out"), "3", "--resume"]
    command = started(shell(BASH, str(CLUSTER / "torchrun.sh"), *words))
    assert command.launcher == "torchrun"
    options = dict(zip(command.options[::2], command.options[1::2], strict=True))
    assert options == {
        **{"--nnodes": "2", "--nproc_per_node": "8", "--max-restarts": "3"},
        **{"--rdzv_backend": "c10d", "--rdzv_endpoint": "node-1:29500"},
    }
    settings = command.settings()
    assert (settings.model.zero_stage, settings.run.output_dir) == (3, str(tmp_path / "out"))


def test_deepspeed_reads_the_hostfile():
    assert dict(fetch_hostfile(str(CLUSTER / "hostfile"))) == {"node-1": 8, "node-2": 8}


def test_the_image_installs_what_the_tests_run_on():
    text = (ROOT / "Dockerfile").read_text()
    commands = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    assert commands[0].startswith("FROM nvidia/cuda:") and "-devel-" in commands[0]
    installs = [line for line in commands if "pip install" in line]
    assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs)
    assert installs[0].endswith(" torch") and "torch==" in (ROOT / "constraints.txt").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv"} <= {*ignored}
