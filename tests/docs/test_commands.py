"""Each command of the pages runs, or `UNTRIED` says why not; here those that take a moment.

test_commands_run.py has the others, which train, load or plan models.
"""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

from tests.docs.page_commands import FAST, ROOT, UNTRIED, commands
from tests.docs.page_folders import run_all
from tests.docs.test_pages import PAGES
from tests.helpers.launch import TIME_LIMIT

ALL = commands()


def test_what_is_not_tried_is_on_a_page():
    assert {*UNTRIED} <= {command.program for command in ALL}


def test_commands_of_a_moment_run(tmp_path: Path):
    wrong = run_all([command for command in ALL if command.program in FAST], tmp_path)
    assert not wrong, wrong


def test_targets_of_make_are_there():
    targets = {command.words[1] for command in ALL if command.program == "make"}
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


def test_scripts_are_there():
    for command in ALL:
        if command.program == "*.sh":
            places = (ROOT, (ROOT / command.page).parent)
            assert any((place / command.words[1]).is_file() for place in places), command.line


STUB = """#!/bin/sh
echo "${0##*/} $*" >> "$CALLS"
case "${0##*/}" in torchrun) exit 75;; scontrol) echo node-1 node-2 node-3;; esac
"""


def test_scripts_for_slurm_run(tmp_path: Path):
    """As they stand, with stubs of what they start: the last command's code is the script's own."""
    for name in ("srun", "scontrol", "curl", "torchrun"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[1-3]",
    }
    calls = {}
    for page in PAGES:
        for script in re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page.read_text(), re.S):
            log = tmp_path / "calls"
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=tmp_path,
                env=env | {"CALLS": str(log)},
                check=False,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
            assert not done.stderr, done.stderr
            calls[page.name] = done.returncode, [*log.read_text().splitlines()]
            log.unlink()
    code, said = calls["resume.md"]
    assert code == 75 and said[-1] == "scontrol requeue 7"
    assert said[0].startswith("torchrun --nproc_per_node 8 main.py")
    code, said = calls["rollout.md"]
    assert code == 0 and said[0] == "scontrol show hostnames node-[1-3]"
    assert any("--nodelist=node-2,node-3" in line and "http://node-1:8000" in line for line in said)
