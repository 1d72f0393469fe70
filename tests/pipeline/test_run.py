"""Running stages: finished ones are skipped, the first that fails ends it, the table tells all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dschat.errors import UserError
from dschat.pipeline import __main__ as program
from dschat.pipeline.closing import changes, close
from dschat.pipeline.run import run_stage, unfinished
from dschat.pipeline.stage import Stage
from dschat.train.checkpoint_folder import write_record
from dschat.train.run_end import mark_end
from dschat.utils.printable import WINDOW
from tests.helpers.steps import preference_rows, write_rows
from tests.helpers.tiny import save_llama_folder


def stage(folder: Path, code: str, kind: str = "sft") -> Stage:
    """A stage whose program is a line of Python."""
    return Stage(kind, kind, (sys.executable, "-c", code), (), folder / kind)


def finish(stage: Stage, *figures: dict[str, float]) -> None:
    """What a stage leaves behind."""
    stage.model.mkdir(parents=True)
    (stage.model / "config.json").touch()
    lines = [json.dumps({"kind": "eval", "step": i} | f) for i, f in enumerate(figures)]
    (stage.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_stage_is_logged_and_timed(tmp_path: Path, capfd):
    seconds = run_stage(stage(tmp_path, "print('hello')"), tmp_path / "sft" / "training.log")
    assert (tmp_path / "sft" / "training.log").read_text() == "hello\n" and seconds > 0
    assert "== sft: " in capfd.readouterr().out


def test_in_a_window_a_stage_is_named_by_its_log(tmp_path: Path, monkeypatch, capfd):
    """A script's command is longer than any window; without one it is told in full."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WINDOW, "80")
    long = stage(tmp_path, f"pass # {'x' * 80}")
    run_stage(long)
    assert capfd.readouterr().out == "\n== sft: what follows is in sft/training.log\n"
    monkeypatch.setenv(WINDOW, "40")
    run_stage(long)
    assert capfd.readouterr().out == "\n== sft: what follows is in\n  sft/training.log\n"
    monkeypatch.delenv(WINDOW)
    run_stage(long)
    assert "x" * 80 in capfd.readouterr().out


def test_all_gpus_of_a_machine_without_one(tmp_path: Path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("model: m\nhardware: single_node\nstages: {sft: }\n")
    out = tmp_path / "out"
    words = ["dschat run", str(tmp_path / "recipe.yaml"), "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="no GPU here; give ranks for the CPU"):
        program.main()
    assert not out.exists()


@pytest.mark.parametrize("code", [2, 75])
def test_the_first_that_fails_ends_the_pipeline_with_its_code(code: int, tmp_path: Path, capfd):
    with pytest.raises(SystemExit) as stop:
        run_stage(stage(tmp_path, f"raise SystemExit({code})"))
    assert stop.value.code == code
    told = capfd.readouterr().err
    assert told == ("" if code == 75 else "error: sft failed with exit code 2\n")


def test_a_log_that_is_newer_makes_no_stage_finished(tmp_path: Path):
    """Stopped over an older model: its log goes on after its checkpoint."""
    one = stage(tmp_path, "", "sft")
    finish(one, {"perplexity": 2.0}, {"perplexity": 1.0})
    assert one.is_finished
    newest = max(path.stat().st_mtime for path in one.folder.iterdir())
    record = one.folder / "checkpoints/step-000002/state.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    (one.folder / "training.log").write_text("stopped by SIGTERM after step 2")
    for path, later in ((record, 1), (one.folder / "training.log", 2)):
        os.utime(path, (newest + later, newest + later))
    assert not one.is_finished
    os.utime(one.folder / "config.json", (newest + 3, newest + 3))
    assert one.is_finished


@pytest.mark.parametrize("backward", [-3600, 3600])
def test_a_clock_that_jumps_finishes_no_stage_and_none_again(backward: int, tmp_path: Path):
    one = stage(tmp_path, "", "sft")
    finish(one, {"perplexity": 1.0})
    checkpoint = one.folder / "checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    write_record(checkpoint, {}, {})
    time = (one.folder / "config.json").stat().st_mtime + backward
    os.utime(checkpoint / "state.json", (time, time))
    assert not one.is_finished
    mark_end(one.folder)
    assert one.is_finished


def test_finished_stages_are_skipped_and_told_in_the_table(tmp_path: Path, capsys):
    stages = [stage(tmp_path, "", kind) for kind in ("sft", "reward", "ppo")]
    finish(stages[0], {"perplexity": 808.08}, {"perplexity": 1.4})
    assert unfinished(stages) == stages[1:]
    finish(stages[1], {"accuracy": 0.5}, {"accuracy": 0.948})
    finish(stages[2], {"reward": -4.45}, {"reward": -0.22})
    close(tmp_path, stages, {"reward": 67.2, "ppo": 62.4}, seed=1)
    assert capsys.readouterr().out.splitlines() == [
        f"sft: finished before, its model is in {tmp_path / 'sft'}",
        "",
        "                     before   after  seconds",
        "sft     perplexity  808.080   1.400  earlier",
        "reward  accuracy      0.500   0.948       67",
        "ppo     reward       -4.450  -0.220       62",
        f"everything is in {tmp_path}",
        f"chat with it: dschat chat {tmp_path / 'ppo' / 'actor'}",
    ]


def test_a_change_within_noise_is_said(tmp_path: Path):
    """Of a share by its interval, of a mean by its error; of a figure without either nothing."""
    stages = [stage(tmp_path, "", kind) for kind in ("sft", "reward", "ppo")]
    finish(stages[0], {"perplexity": 9.0}, {"perplexity": 8.0})
    before, after = (
        {"accuracy": share, "accuracy_low": low, "accuracy_high": high}
        for share, low, high in ((0.43, 0.27, 0.61), (0.90, 0.74, 0.97))
    )
    finish(stages[1], before, after)
    finish(stages[2], *({"reward": mean, "reward_error": 0.13} for mean in (-0.09, 0.5, 0.0)))
    assert list(changes(stages)) == [
        "reward: accuracy by +0.470 (95 % interval +0.229 to +0.645)",
        "ppo: reward by +0.090 (95 % interval -0.270 to +0.450), within noise",
    ]


def test_all_stages_are_checked_before_the_first_starts(tmp_path: Path, monkeypatch, capsys):
    save_llama_folder(tmp_path / "model", max_position_embeddings=128)
    write_rows(tmp_path / "pairs.jsonl", preference_rows(40, seed=0))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path}/model\ndata_path: [{tmp_path}/pairs.jsonl]\n"
        "stages:\n  sft: {max_seq_len: 64, dtype: fp32}\n  dpo: {max_seq_len: 64, dtype: fp32}\n"
        "  reward: {max_seq_len: 64, dtype: fp32}\n  ppo: {max_prompt_seq_len: 48, "
        "max_answer_seq_len: 8, dtype: fp32}\n"
    )
    started: list[str] = []
    monkeypatch.setattr(program, "logged", lambda stage: started.append(stage.kind) or 1.0)
    argv = ["dschat run", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    told = capsys.readouterr().out
    kinds = ["sft", "dpo", "reward", "ppo"]
    checked = [line.split(":")[0] for line in told.splitlines() if "optimizer steps" in line]
    assert checked == kinds == started and "model folders: " in told
    monkeypatch.setattr(program, "check_ahead", lambda stages, *_, fit: stages)
    monkeypatch.setattr(sys, "argv", [*argv, "--dry_run"])
    program.main()
    assert started == kinds
