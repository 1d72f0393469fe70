"""Run the shipped shell scripts with launchers that only print their arguments."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.config.programs import PromptEvaluation, RewardEvaluation
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
DPO = "step2_dpo_finetuning/training_scripts/"
STEP1, STEP2, STEP3 = (
    "step1_supervised_finetuning/training_scripts/opt/",
    "step2_reward_model_finetuning/training_scripts/opt/",
    "step3_rlhf_finetuning/training_scripts/opt/",
)
FAKE = """#!/bin/sh
if [ "$1 $2" = "-m dschat.train.launch" ]; then
  log=$4; shift 4
  "$@" > "$0.out" 2>&1; code=$?
  cat "$0.out"; cat "$0.out" >> "$log"; exit $code
fi
printf "%s\\n" "${0##*/}" "$@"
exit "${FAKE_EXIT:-0}"
"""


@dataclass(frozen=True)
class Started:
    """A script's last command: the launcher, its own options, main.py's arguments."""

    launcher: str
    options: list[str]
    program: Path
    arguments: list[str]

    def settings(self) -> Any:
        """The arguments as that program's own settings; raises UserError like the program."""
        return parse(settings_class(self.program), self.arguments, "")


def load(path: Path, name: str) -> ModuleType:
    """A file of the checkout as a module, without running its main()."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def settings_class(program: Path) -> type:
    """The settings of a step's main.py, or of an evaluation script."""
    if program.name == "rw_eval.py":
        return RewardEvaluation
    if program.name == "prompt_eval.py":
        return PromptEvaluation
    assert program.name == "main.py"
    return {
        "step1_supervised_finetuning": SFTSettings,
        "step2_reward_model_finetuning": RewardSettings,
        "step2_dpo_finetuning": DPOSettings,
        "step3_rlhf_finetuning": RLHFSettings,
    }[program.parent.name]


def fake_launchers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess]:
    """Put a `deepspeed` and a `python` first on the path that print one argument a line.

    Scripts for several nodes find a hostfile, the folder's `hosts`.

    Returns:
        What runs a command in an empty folder. The launchers exit with FAKE_EXIT, 0 by default.
    """
    fakes, empty = folder / "bin", folder / "cwd"
    fakes.mkdir()
    empty.mkdir()
    for name in ("deepspeed", "python"):
        (fakes / name).write_text(FAKE)
        (fakes / name).chmod(0o755)
    (folder / "hosts").write_text("node-1 slots=8\nnode-2 slots=8\n")
    monkeypatch.setenv("HOSTFILE", str(folder / "hosts"))
    monkeypatch.delenv("LAUNCHER", raising=False)
    monkeypatch.setenv("PATH", f"{fakes}{os.pathsep}{os.environ['PATH']}")

    def run(*command: str, start_new_session: bool = False) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=empty,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT,
            start_new_session=start_new_session,
        )

    return run


def started(process: subprocess.CompletedProcess) -> Started:
    """Take apart what the fake launcher printed."""
    assert process.returncode == 0, process.stderr
    launcher, *words = process.stdout.splitlines()
    if launcher == "deepspeed":  # which tells of its own doings otherwise
        assert words[:2] == ["--log_level", "warning"]
        words = words[2:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Started(launcher, words[:at], Path(words[at]), words[at + 1 :])
