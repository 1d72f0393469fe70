"""Every file of small folders damaged in every way; the functions are those of a resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dschat.data import cache, datasets, store, text_blocks
from dschat.report.records import ANSWERS, METRICS
from dschat.rlhf import ppo_log
from dschat.rlhf import prepare as prepare_ppo
from dschat.train import checkpoint_folder, checkpoint_source, checkpointer, checksums, prepare
from tests.faults import in_process
from tests.faults.damages import damages_of
from tests.faults.in_process import FOUND, SAME, UNDETECTED, Appended, Cached, Checkpoints, Models
from tests.faults.programs import OUTPUT, Layout
from tests.helpers import tiny
from tests.train.test_checkpoint_folder import RECORD, save

LAYOUT = Layout.named("sft-z0-r1")
FEW = ("first", "last", "removed", "sibling")


def two_checkpoints(folder: Path) -> Checkpoints:
    checkpoints = checkpoint_folder.folder_of(folder / OUTPUT)
    for step in (3, 6):
        part = checkpoint_folder.unfinished_path(checkpoints, step)
        (part / "model").mkdir(parents=True)
        (part / "model/weights.pt").write_text(f"of step {step}")
        (part / "random.pt").write_text(f"at step {step}")
        digests = checkpoint_folder.digests_of(part, checkpoint_folder.names_in(part))
        checkpoint_folder.write_record(part, RECORD | {"step": step}, digests)
        checkpoint_folder.publish(checkpoints, step, limit=2)
    return Checkpoints(folder, ranks=2)


def a_model(folder: Path) -> Models:
    tiny.save_llama_folder(folder / "model")
    tiny.save_llama_folder(folder / "older", seed=5)
    return Models(folder, LAYOUT, "model")


def two_sets(folder: Path) -> Cached:
    root = folder / "cache"
    root.mkdir()
    for key in "ab":
        cache.written_once(root, "rows", key, lambda part, key=key: (part / "x").write_text(key))
    return Cached(folder, folder / "kept")


def resumed_files(folder: Path) -> Appended:
    """Both have two lines behind those of the checkpoint."""
    save(folder / OUTPUT, 2)
    for name in (ANSWERS, METRICS):
        lines = [json.dumps({"kind": "train", "iteration": n, "step": n}) + "\n" for n in range(5)]
        (folder / OUTPUT / name).write_text("".join(lines))
        saved = folder / OUTPUT / "checkpoints/step-000002" / name
        saved.write_text("".join(lines[:3]))
    return Appended(folder)


PLACES: dict[str, Callable[[Path], in_process.Place]] = {
    "checkpoint": two_checkpoints,
    "model": a_model,
    "cache": two_sets,
    "output": resumed_files,
}


@pytest.mark.parametrize("target", PLACES)
def test_every_file_damaged_in_every_way_is_found_and_named(tmp_path, target):
    found = in_process.sweep(PLACES[target](tmp_path), FEW if target == "model" else ())
    assert found.complaints == [] and found.outcomes[UNDETECTED] == 0
    assert found.outcomes[FOUND] >= 10 and found.files >= 2
    assert found.outcomes[SAME] <= {"checkpoint": 2, "output": 8}.get(target, 0)


# What finds damage, and what it must be blind to for damage to be undetected.
BLINDED = {
    "checkpoint": (checkpoint_folder, "check_files", lambda folder, digests: None),
    "model": (in_process, "frozen_checksum", lambda module: "always"),
    "cache": (cache, "damage_of", lambda folder: None),
    "output": (in_process, "AnswerFile", lambda *words: None),
}


@pytest.mark.parametrize("target", PLACES)
def test_what_is_not_found_is_told(tmp_path, monkeypatch, target):
    monkeypatch.setattr(*BLINDED[target])
    found = in_process.sweep(PLACES[target](tmp_path), FEW)
    assert found.outcomes[UNDETECTED] == len(found.complaints) > 0


def test_the_functions_are_those_that_a_resume_calls():
    """By identity; `damage` cases also hold their answers against whole starts."""
    assert checkpointer.find_checkpoint is in_process.find_checkpoint
    assert checkpointer.frozen_checksum is in_process.frozen_checksum is checksums.frozen_checksum
    assert checkpoint_source.checkpoint_folder is in_process.checkpoint_folder
    for program in (prepare, prepare_ppo):
        assert program.model_files is in_process.model_files
        assert program.Checkpointer is checkpointer.Checkpointer
    assert prepare.check_model_folder is in_process.check_model_folder
    for reader in (store, datasets, text_blocks):
        assert reader.written_once is cache.written_once
    assert ppo_log.AnswerFile is in_process.AnswerFile


def test_a_checkpointer_looks_for_its_checkpoint_by_them(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpointer, "find_checkpoint", lambda *words: asked.append(words))
    config = checkpointer.CheckpointConfig()
    made = checkpointer.Checkpointer(config, str(tmp_path), in_process.ANY_PLAN, None)
    assert asked == [(config, str(tmp_path), in_process.ANY_PLAN, None)]
    assert made.continued is None


def test_the_ways_of_damage():
    content = bytes(range(256)) * 8
    ways = dict(damages_of(content, b"other"))
    bits = {n: b for n, b in ways.items() if b is not None and len(b) == len(content)}
    assert {*bits} == {"first", "middle", "last", "kib 0", "kib 1"}
    for damaged in bits.values():
        changed = [(a, b) for a, b in zip(content, damaged, strict=True) if a != b]
        assert len(changed) == 1 and (changed[0][0] ^ changed[0][1]).bit_count() == 1
    assert [len(ways[name] or b"") for name in ("half", "short", "empty", "longer")] == [
        *(1024, 2047, 0, 2049)
    ]
    assert ways["removed"] is None and ways["sibling"] == b"other"
    assert {*dict(damages_of(b""))} == {"longer", "removed"}
