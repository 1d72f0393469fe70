"""What another machine may change of a run; checkpoints looked at, verified and converted."""

import json
from pathlib import Path

import pytest

from dschat.checkpoint import main
from dschat.errors import UserError
from dschat.train import checkpoint_folder
from dschat.train.machine import without_shape

SAVED = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "max_tokens_per_batch": None,
    "zero_stage": 2,
    "offload": False,
    "learning_rate": 1e-3,
    "total_steps": 20,
}
RECORD = {
    "kind": "step 1 (SFT)",
    "processes": 2,
    "engines": {"model": {"peak_rates": {"lora_A": 1e-3, "lora_B": 16e-3}}},
    "settings": SAVED,
    "step": 10,
    "epoch": 0,
    "batch": 20,
    "frozen_weights": {},
}


def compared(processes: int, **now: object) -> bool:
    saved, present = without_shape("step-10", RECORD, SAVED | now, processes)
    return saved == present


def test_shape_may_change_where_all_ranks_together_take_the_same_rows():
    shape = {"zero_stage": 3, "offload": True, "per_device_eval_batch_size": 1}
    assert compared(8, per_device_train_batch_size=1, **shape)
    assert compared(1, per_device_train_batch_size=8, zero_stage=0)
    assert not compared(1, per_device_train_batch_size=8, learning_rate=1e-4)
    assert not compared(1, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert not compared(1, per_device_train_batch_size=8, total_steps=21)


@pytest.mark.parametrize(
    ("processes", "rows", "words"),
    [
        (4, 4, "2 processes with .* 4 took 8 together, 4 with 4 would take 16; give .*size 2, so"),
        (3, 4, "3 with 4 would take 12; start a number of processes that divides 8"),
    ],
)
def test_other_rows_in_a_step_are_refused(processes, rows, words):
    with pytest.raises(UserError, match=words):
        compared(processes, per_device_train_batch_size=rows)


def test_batches_by_tokens_are_kept_by_their_number():
    """Two ranks, two micro-batches each: four of one rank."""
    by_tokens = {**RECORD, "settings": SAVED | {"max_tokens_per_batch": 512}}
    now = by_tokens["settings"] | {"gradient_accumulation_steps": 4}
    saved, present = without_shape("x", by_tokens, now, 1)
    assert saved == present
    with pytest.raises(UserError, match="give gradient_accumulation_steps 4"):
        without_shape("x", by_tokens, by_tokens["settings"], 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "step-000010"
    made.mkdir()
    (made / "metrics.jsonl").write_text("{}\n")
    write(made)
    return made


def write(folder: Path, **changes: object) -> None:
    names = checkpoint_folder.names_in(folder)
    digests = checkpoint_folder.digests_of(folder, names)
    checkpoint_folder.write_record(folder, RECORD | changes, digests)


def test_inspect_tells_what_it_is(folder: Path, capsys):
    main(["inspect", str(folder)])
    said = capsys.readouterr().out
    assert "step 1 (SFT), step 10 of 20\nepoch 1, 20 batches of it used up\n" in said
    assert (
        "saved by 2 processes, zero_stage 2\nmodel: peak rates lora_A 0.001, lora_B 0.016" in said
    )
    assert "metrics.jsonl" in said and said.endswith("1 files, every byte as it was saved\n")


def test_verify_names_the_file_and_ends_with_1(folder: Path, capsys):
    main(["verify", str(folder)])
    (folder / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(folder)])
    assert stop.value.code == 1
    assert "metrics.jsonl is damaged" in capsys.readouterr().err


def test_what_cannot_be_converted(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="did not list the model's parameters; resume it as it is"):
        main(["convert", str(folder), str(tmp_path / "out")])
    with pytest.raises(UserError, match="step-000010: is there already; give another folder"):
        main(["convert", str(folder), str(folder)])
    write(folder, portable=True)
    with pytest.raises(UserError, match="is portable already; resume from it"):
        main(["convert", str(folder), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert json.loads((folder / "state.json").read_text())["portable"]
