"""The GPU day's cases are command lines of the programs, and its page says what was measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_day import __main__ as driver
from benchmarks.gpu_day import run
from benchmarks.gpu_day.cases import CASES
from benchmarks.gpu_day.run import Figures, Machine, flags_of, run_case
from dschat.config.cli import parse
from dschat.plan.recipe import STEPS

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_understood_by_its_program(monkeypatch, tmp_path: Path, case):
    monkeypatch.setattr(run, "_model", lambda machine, shape: machine.folder / shape)
    machine = Machine(tmp_path, H100)
    settings = parse(STEPS[case.program], flags_of(case, machine, tmp_path / "out"), None)
    assert settings.run.dtype == "bf16"


def test_needed_cases_come_along_and_before():
    names = [case.name for case in driver.chosen(["ppo opt-1.3b, static"], tiny=False)]
    assert names == ["reward opt-350m", "ppo opt-1.3b, static"]
    assert driver.chosen([], tiny=False) == [*CASES]


def test_figures_of_a_run_on_a_fake_gpu(monkeypatch, tmp_path: Path):
    """Two warm steps are left out; 36,128 weights in bf16, read 8 times in 1 ms."""
    made = run._model
    monkeypatch.setattr(run, "_model", lambda m, shape: made(replace(m, device=None), shape))
    case = next(c for c in CASES if c.name == "grpo llama-3-8b, static").tiny()
    machine = Machine(tmp_path, H100, rows=2, length=64)
    lines = [
        {"kind": "train", "answer_tokens_per_s": speed, "seconds/generation": 1e-3}
        for speed in (1.0, 1.0, 500.0, 700.0, 600.0)
    ]

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[0] == sys.executable and command[3].endswith("finetuning/main.py")
        output = Path(command[command.index("--output_dir") + 1])
        output.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (output / "metrics.jsonl").write_text(text)
        Path(command[2]).write_text(json.dumps({"peak": 2**31}))
        return subprocess.CompletedProcess(command, 0, "... | MFU 31.5 % (exact count)\n", "")

    monkeypatch.setattr(subprocess, "run", fake)
    found = run_case(case, machine)
    assert found.error is None and found.speeds == {"answer_tokens_per_s": 600.0}
    assert found.mfu == pytest.approx(0.315) and found.peak == 2.0
    # Embedding and head 1024 x 32 each; a layer 4 x 32 x 32 + 3 x 32 x 64 + 2 x 32; a norm of 32.
    weights = 2 * (2 * 1024 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32)
    assert found.bandwidth == pytest.approx(weights * 8 / 1e-3 / 3350e9)
    assert found.planned is not None and found.planned > 0

    monkeypatch.setattr(
        subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 2, "", "error: no room\n")
    )
    assert run_case(case, machine).error == "error: no room"


def test_the_page_and_the_record(tmp_path: Path):
    whole = Figures("a", {"tokens_per_s": 1234.5}, 0.4, None, 20.0, 21.0)
    found = [whole, Figures("b", error="error: no room")]
    driver.write(Machine(tmp_path, H100), "6 passed", found)
    lines = (tmp_path / "gpu_day.md").read_text().splitlines()
    assert lines[:3] == [f"# {H100}, bf16", "", "tests/gpu: 6 passed"]
    assert lines[-2] == "| a | 1,234 |  | 40.0% |  | 20.0 | 21.0 | +5.0% |"
    assert lines[-1].startswith("| b | failed: error: no room |")
    record = json.loads((tmp_path / "gpu_day.json").read_text())
    assert record["device"] == H100 and record["cases"][0]["peak"] == 20.0
