"""Help and errors of a command line need none of the packages that take seconds to import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dschat import lazy
from dschat.command.registry import COMMANDS
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.steps import (
    DPO,
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    SFT,
)

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "transformers", "datasets", "deepspeed", "numpy", "pyarrow", "huggingface_hub")
PROGRAMS = {
    SFT: "--learning_rat",
    REWARD: "--learning_rat",
    DPO: "--bta",
    PPO: "--kl_coeff",
    REWARD_EVALUATION: "--sho",
    PROMPT_EVALUATION: "--num_beam",
    "chat.py": "--pth",
    "inference/chatbot.py": "--pth",
    "e2e_rlhf.py": "--step=4",
    "dschat/merge.py": "--dtyp",
    "dschat/checkpoint.py": "--x",
    "dschat/data/__main__.py": "inspec",
}
MODEL = ("--model_name_or_path", "m")
ROLES = ("--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c")
# Values and files that are wrong, and what must be said.
WRONG = {
    "a value": ((SFT, *MODEL, "--max_seq_len", "3"), "max_seq_len is 3"),
    "two flags": ((SFT, *MODEL, "--packing", "--max_tokens_per_batch", "600"), "drop one"),
    "a split": ((REWARD, *MODEL, "--data_split", "1,2"), "data_split '1,2' has 2 numbers"),
    "roles": ((PPO, *ROLES, "--actor_zero_stage", "3", "--fuse_lora"), "did you mean"),
    "fusing": ((PPO, *ROLES, "--fuse_lora_for_generation"), "add actor_lora_dim"),
    "no YAML": ((DPO, "--config", "missing.yaml"), "config missing.yaml: No such file"),
    "no JSON": ((SFT, *MODEL, "--deepspeed_config", "missing.json"), "missing.json: no such file"),
    "no data": ((SFT, *MODEL, "--data_path", "./no.jsonl"), "data_path ./no.jsonl: no such file"),
    "no model": ((DPO, "--model_name_or_path", "./none"), "tokenizer './none' is not a folder"),
    "inspect": (("dschat/data/__main__.py", "inspect", *MODEL, "--phas", "1"), "mean --phase"),
}
RUN = """
import contextlib, io, json, runpy, sys
results = []
for argv in json.loads(sys.argv[1]):
    sys.argv, out, err, code = argv, io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    slow = [name for name in %r if name in sys.modules]
    results.append([code, out.getvalue(), err.getvalue(), slow])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ends() -> dict[tuple[str, ...], tuple[int, str, str, list[str]]]:
    """Exit code, output, errors and slow packages of each command line, all in one process."""
    plan = [(name, word) for name, typo in PROGRAMS.items() for word in ("--help", typo)]
    plan += [argv for argv, _ in WRONG.values()]
    plan += [("dschat/__main__.py", name, "--help") for name in COMMANDS]
    plan += [("dschat/__main__.py", name, "--no_such_flag") for name in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", RUN % (SLOW,), json.dumps(plan)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(plan, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_typo(ends, program):
    code, out, err, slow = ends[program, "--help"]
    assert (code, err, slow) == (0, "", []) and out.strip()
    code, _, err, slow = ends[program, PROGRAMS[program]]
    assert (code, slow, err.count("\n")) == (2, [], 1) and err.startswith("error: ")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_or_file(ends, case):
    argv, message = WRONG[case]
    code, _, err, slow = ends[argv]
    assert (code, slow, err.count("\n")) == (2, [], 1) and message in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_program(ends, name):
    code, out, err, slow = ends["dschat/__main__.py", name, "--help"]
    assert (code, err, slow) == (0, "", []) and out.startswith(f"usage: dschat {name} ")
    examples = re.compile(r" {4}\S")  # commands, to be copied whole
    assert all(len(x) <= 80 for x in out.splitlines() if not examples.match(x))
    code, _, err, slow = ends["dschat/__main__.py", name, "--no_such_flag"]
    assert (code, slow, err.count("\n")) == (2, [], 1) and err.startswith("error: ")


def test_a_lazy_package_is_the_package(monkeypatch):
    import torch

    assert lazy.torch.Tensor is torch.Tensor
    monkeypatch.setattr(lazy.torch, "of_a_test", 1, raising=False)
    assert torch.of_a_test == 1
    monkeypatch.undo()
    assert not hasattr(torch, "of_a_test")
