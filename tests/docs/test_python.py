"""docs/python.md runs as it stands; what it does not show: settings objects, errors, callbacks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dschat
from dschat.api.run import Run
from dschat.api.steps import DPO, PPO, SFT, Step
from dschat.config import SFTSettings
from dschat.errors import UserError
from dschat.train import observers
from dschat.train.checkpoint_config import NEWEST
from dschat.train.metrics import LogConfig, MetricLogger
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]
HERE = {"model_name_or_path": str(ROOT), "data_path": str(ROOT / "README.md")}


@pytest.mark.slow
def test_the_page_runs_in_one_process(tmp_path: Path):
    script = [sys.executable, "-m", "tests.docs.python_page", str(ROOT / "docs/python.md")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unknown setting lora_dims; did you mean lora_dim?" in done.stdout
    told = json.loads((tmp_path / "told.json").read_text())
    assert 0 < told["figures"]["loss"] < 20 and told["train"][-1][0] == 3  # 36 rows by 16
    assert told["kinds"][0] == "LlamaForCausalLM" and "Tokenizer" in told["kinds"][1]
    assert told["turns"] == 1 and told["ppo"] == ["out/ppo", "out/ppo/actor"]
    assert len(told["rewards"]) >= 1 and all(map(math.isfinite, told["rewards"]))
    assert (tmp_path / "out" / "sft" / "report.html").exists()
    assert not (tmp_path / "out" / "sft" / ".lock").exists()


def test_flags_become_the_settings():
    step = SFT(**HERE, lora_dim=8, output_dir=Path("out"))
    assert step.settings == SFTSettings.of(
        **{**HERE, "data_path": [HERE["data_path"]]}, lora_dim=8, output_dir="out"
    )
    assert SFT(step.settings).settings is step.settings
    kept = [SFT(**HERE, resume=value).settings.run.checkpoint.resume for value in (True, False)]
    assert kept == [NEWEST, None]  # as the flag without a value, and none
    numbers = SFT(**HERE, lora_dim=np.int64(8), learning_rate=np.float32(0.5)).settings.model
    assert (type(numbers.lora.lora_dim), numbers.lora.lora_dim) == (int, 8)
    assert numbers.optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFT(**HERE, lora_dims=8), "unknown setting lora_dims; did you mean lora_dim?"),
        (lambda: SFT(**HERE, max_seq_len=3), "max_seq_len is 3"),
        (lambda: SFT(**HERE | {"data_path": "./none.jsonl"}), "data_path ./none.jsonl: no such"),
        (lambda: SFT(), "model_name_or_path is required"),
        (lambda: DPO(SFT(**HERE).settings), "DPO takes DPOSettings, not SFTSettings"),
        (lambda: SFT(SFT(**HERE).settings, lora_dim=8), "lora_dim: give a settings object, or"),
        (lambda: PPO(**HERE), "unknown setting model_name_or_path; did you mean"),
        (lambda: SFT(HERE), "not dict; flags come by name, SFT(**flags)"),
        (lambda: SFT(**HERE | {"model_name_or_path": SFT(**HERE)}), "give the run that its train("),
        (lambda: SFT(**HERE, learning_rate="1e-3"), "learning_rate is '1e-3': give a number above"),
        (lambda: SFT(**HERE, lora_dim=4.0), "lora_dim is 4.0: give a whole number"),
        (lambda: SFT(**HERE).train(on_step=3), "on_step is 3: give a function of step and figures"),
    ],
)
def test_bad_input_is_an_exception_of_one_line(make, message):
    with pytest.raises(dschat.UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_error_in_the_program_is_raised_and_lets_go(tmp_path: Path, monkeypatch):
    """A folder that is no model: the command would exit with 2."""
    released = []
    monkeypatch.setattr("dschat.train.run_lock.release", lambda: released.append(True))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    step = SFT(model_name_or_path=str(tmp_path), data_path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError):
        step.train()
    assert released == [True]


def test_observers_hear_what_is_logged(tmp_path: Path):
    heard: list = []
    log = MetricLogger(LogConfig(no_report=True), tmp_path, 0)
    with observers.observed_by(lambda *what: heard.append(what)):
        log.log(1, {"loss": 2})
        log.log(1, {"loss": 3.0}, kind="eval")
    log.log(2, {"loss": 1})
    assert heard == [("train", 1, {"loss": 2.0}), ("eval", 1, {"loss": 3.0})]


def test_names_of_the_package_are_imported_when_used():
    code = "import sys, dschat; assert 'torch' not in sys.modules; print(dir(dschat))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "'RewardModel'" in done.stdout, done.stderr
    assert all(issubclass(getattr(dschat, name), Step) for name in ("SFT", "DPO", "PPO"))
    with pytest.raises(AttributeError, match="no attribute 'SFTT'"):
        dschat.SFTT  # noqa: B018


def test_a_reward_model_does_not_chat(tmp_path: Path):
    with pytest.raises(UserError, match="a reward model does not answer"):
        Run(tmp_path, tmp_path, scores=True).chat("Hi")
