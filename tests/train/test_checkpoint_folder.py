"""Folders of checkpoints: choosing, refusing and removing them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dschat.errors import UserError
from dschat.train import checkpoint_folder
from dschat.train.checkpoint_folder import (
    NEWEST,
    check_files,
    checkpoints_in,
    choose,
    read_record,
)

RECORD = {"kind": "a test", "epoch": 0, "batch": 4, "processes": 1, "frozen_weights": {}}
RECORD |= {"engines": {"model": {"peak_rates": {"lora_A": 1e-3}}}, "settings": {"total_steps": 9}}


def write_checkpoint(output: Path, step: int) -> Path:
    """Write a finished checkpoint, not yet published."""
    part = checkpoint_folder.unfinished_path(checkpoint_folder.folder_of(output), step)
    (part / "model").mkdir(parents=True)
    (part / "model" / "weights.pt").write_bytes(b"12345")
    digests = checkpoint_folder.digests_of(part, checkpoint_folder.names_in(part))
    checkpoint_folder.write_record(part, RECORD | {"step": step}, digests)
    return part


def save(output: Path, step: int, limit: int = 1) -> None:
    write_checkpoint(output, step)
    checkpoint_folder.publish(checkpoint_folder.folder_of(output), step, limit)


def present(output: Path) -> list[str]:
    return sorted(os.listdir(checkpoint_folder.folder_of(output)))


def test_the_newest_stay_and_steps_are_numbers(tmp_path):
    for step in (5, 999_999, 1_000_000):
        save(tmp_path, step, limit=2)
    assert list(checkpoints_in(tmp_path / "checkpoints")) == [999_999, 1_000_000]
    chosen = choose(str(tmp_path), NEWEST)
    assert [path.name for path in chosen] == ["step-1000000", "step-999999"]


def test_an_old_checkpoint_goes_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    seen = []
    original = Path.rename

    def rename(path, target):
        seen.append((path.name, present(tmp_path)))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    checkpoint_folder.publish(tmp_path / "checkpoints", 2, limit=1)
    assert seen == [
        (".step-000002.tmp", [".step-000002.tmp", "step-000001"]),
        ("step-000001", ["step-000001", "step-000002"]),
    ]
    assert present(tmp_path) == ["step-000002"]


def test_a_run_that_went_back_replaces_what_came_after(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, limit=3)
    save(tmp_path, 15, limit=2)  # after a resume from step 10
    assert present(tmp_path) == ["step-000010", "step-000015"]
    save(tmp_path, 15, limit=2)  # once more from step 10
    assert present(tmp_path) == ["step-000010", "step-000015"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_step_that_is_there_is_exchanged(tmp_path, monkeypatch, can_exchange):
    folder = tmp_path / "checkpoints"
    save(tmp_path, 15)
    (write_checkpoint(tmp_path, 15) / "new").touch()
    original, renamed = Path.rename, []

    def rename(path, target):
        renamed.append(path.name)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    if not can_exchange:
        monkeypatch.setattr(checkpoint_folder, "exchange", lambda first, second: False)
    checkpoint_folder.publish(folder, 15, limit=1)
    assert present(tmp_path) == ["step-000015"]
    assert (folder / "step-000015" / "new").exists()
    assert renamed == ([] if can_exchange else ["step-000015", ".step-000015.tmp"])


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path, monkeypatch):
    """Where the system has no exchange, as on NFS, and a step is saved once more."""
    save(tmp_path, 15)
    write_checkpoint(tmp_path, 15)
    original = Path.rename

    def rename(path, target):
        if path.name == ".step-000015.tmp":
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(checkpoint_folder, "exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_folder.publish(tmp_path / "checkpoints", 15, limit=1)
    monkeypatch.undo()
    assert checkpoints_in(tmp_path / "checkpoints") == {}
    back, removed = checkpoint_folder.repair(tmp_path)
    assert back.endswith("step-000015: brought back, a killed run had moved it aside")
    assert ".step-000015.tmp: removed" in removed
    assert read_record(tmp_path / "checkpoints/step-000015")["step"] == 15


def test_what_is_replaced_goes_when_the_disk_has_the_new_name(tmp_path, monkeypatch):
    done = []
    for name in ("sync", "remove"):
        original = getattr(checkpoint_folder, name)

        def note(path, name=name, original=original):
            done.append((name, path.name) if path.exists() else None)
            original(path)

        monkeypatch.setattr(checkpoint_folder, name, note)
    save(tmp_path, 15)
    done.clear()
    save(tmp_path, 15)
    assert [step for step in done if step] == [
        ("sync", "checkpoints"),
        ("remove", ".step-000015.tmp"),
    ]


def test_every_file_and_folder_is_synced_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    part, synced = write_checkpoint(tmp_path, 1), set()
    original = os.fsync

    def fsync(descriptor):
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    expected = {part, *part.rglob("*"), part.parent}
    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint_folder.publish(part.parent, 1, limit=1)
    assert synced == expected and part / "model" in synced


def test_leftovers_are_no_checkpoints_and_are_removed(tmp_path):
    save(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoints" / ".step-000000.old.tmp").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    (tmp_path / "checkpoints" / ".step-000003.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / "checkpoints" / ".step-000004.tmp").touch()
    assert [path.name for path in choose(str(tmp_path), NEWEST)] == ["step-000001"]
    lines = checkpoint_folder.repair(tmp_path)
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines] == [
        ".step-000000.old.tmp",
        ".step-000002.tmp",
        ".step-000003.tmp",
        ".step-000004.tmp",
    ]
    assert "removed, a killed run left it unfinished" in lines[1]
    assert checkpoint_folder.repair(tmp_path) == []
    assert present(tmp_path) == ["step-000001"]
    assert (tmp_path / "mine" / "notes").exists()


@pytest.mark.parametrize(
    "resume, message",
    [
        (None, "holds checkpoints of an earlier run (step-000001); give resume"),
        ("elsewhere", "holds checkpoints of an earlier run (step-000001); give resume"),
        ("nowhere", "resume nowhere: no such folder"),
    ],
)
def test_a_run_that_does_not_start(tmp_path, monkeypatch, resume, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "out", 1)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError) as error:
        choose("out", resume)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_where_a_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "out", 1)
    (tmp_path / "elsewhere").mkdir()
    state = "out/checkpoints/step-000001"
    assert choose("out", state) == [Path(state)]
    assert choose("new", None) == []
    assert choose("new", "elsewhere") == [Path("elsewhere")]
    assert choose("new", NEWEST) == []


def test_a_complete_checkpoint(tmp_path):
    save(tmp_path, 3)
    record = read_record(tmp_path / "checkpoints" / "step-000003")
    assert record["step"] == 3
    digest = hashlib.sha256(b"12345").hexdigest()
    assert record["files"] == {"model/weights.pt": digest}
    check_files(tmp_path / "checkpoints" / "step-000003", record["files"])


def make_pipe(path: Path) -> None:
    """Put a pipe that nobody writes into in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def edited(text: str, other: str) -> Callable[[Path], None]:
    """Replace a text in the record."""

    def edit(state: Path) -> None:
        record = state / "state.json"
        record.write_text(record.read_text().replace(text, other))

    return edit


def with_digest(**changes: object) -> Callable[[Path], None]:
    """Change the record as somebody would who makes its digest anew; None removes an entry."""

    def change(state: Path) -> None:
        record = {**json.loads((state / "state.json").read_text()), **changes}
        record = {
            n: v for n, v in record.items() if v is not None and n not in ("digest", "format")
        }
        checkpoint_folder.write_record(state, record, record.pop("files", {}))

    return change


@pytest.mark.parametrize(
    "damage, message",
    [
        *[
            (with_digest(**{name: value}), f"state.json holds {name} {value!r:.40}; remove")
            for name, value in [
                *(("step", "8"), ("epoch", -1), ("batch", None), ("processes", [2])),
                *(("kind", 3), ("settings", []), ("engines", None), ("frozen_weights", "x")),
            ]
        ],
        (with_digest(engines={"model": 3}), "state.json holds an engine without its rates; remo"),
        (with_digest(files={"../x": ""}), "state.json names ../x, which is outside; remove"),
        (with_digest(files={}), "model/weights.pt is no file of this checkpoint; remove it"),
        (
            lambda s: (s / "model/layer_00.pt").write_text(""),
            "model/layer_00.pt is no file of this checkpoint; r",
        ),
        (lambda s: make_pipe(s / "state.json"), "state.json cannot be read; remove"),
        (lambda s: (s / "state.json").unlink(), "has no state.json, so it is no checkpoint"),
        (lambda s: (s / "state.json").write_text("{"), "state.json cannot be read; remove"),
        (lambda s: (s / "state.json").write_text("[]"), "state.json cannot be read; remove"),
        (lambda s: (s / "state.json").write_text("[" * 9999), "state.json cannot be read; remove"),
        (
            lambda s: (s / "state.json").write_text(json.dumps({"format": 9, "files": {}})),
            "of format 9, this code reads format 3",
        ),
        (edited('"step": 3', '"step": 8'), "state.json is not as it was written; remove"),
        (edited('"files"', '"other"'), "state.json is not as it was written; remove"),
        (edited('"digest"', '"other"'), "state.json is not as it was written; remove"),
        (lambda s: (s / "model/weights.pt").unlink(), "model/weights.pt is missing; remove"),
    ],
)
def test_an_incomplete_checkpoint(tmp_path, damage, message):
    save(tmp_path, 3)
    state = tmp_path / "checkpoints" / "step-000003"
    damage(state)
    with pytest.raises(UserError) as error:
        read_record(state)
    assert str(error.value).startswith(f"resume {state}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"1234", b"", b"12347", b"123450", b"54321"])
def test_damaged_bytes(tmp_path, content):
    save(tmp_path, 3)
    state = tmp_path / "checkpoints" / "step-000003"
    (state / "model/weights.pt").write_bytes(content)
    record = read_record(state)
    with pytest.raises(UserError, match=r"step-000003: model/weights.pt is damaged; remove"):
        check_files(state, record["files"])
