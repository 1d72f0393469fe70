"""A model takes its place whole, whenever the process dies, and the user's own files stay put."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dschat.models import placing
from dschat.models.placing import begin, commit, drop, repair
from dschat.models.save import check_output_dir
from dschat.models.save_plan import TEMPLATES, holds_model
from dschat.utils.files import make_folder
from tests.helpers.tiers import tiers

OPERATIONS = ("rename", "unlink", "rmdir", "mkdir", "fsync")
USERS = {
    "training.log": "log",
    "notes/ideas.txt": "ideas",
    "checkpoints/step-000001/state.json": "{}",
    "adapter/notes.txt": "about the adapter",
}
# Models by the files of each: text that differs between two models where they do.
ONE = {"config.json": "shape", "tokenizer.json": "words", "model.safetensors": "one"}
AGAIN = {**ONE, "model.safetensors": "two"}
ADAPTER = {"adapter/adapter_config.json": "rank", "adapter/adapter_model.safetensors": "a"}
BOTH = {**ONE, **ADAPTER, "adapter/tokenizer.json": "words"}
SHARDS = {
    "config.json": "another shape",
    "tokenizer.json": "other words",
    "model-00001-of-00002.safetensors": "three",
    "model-00002-of-00002.safetensors": "three",
    "model.safetensors.index.json": "{}",
    "adapter/adapter_config.json": "another rank",
    "adapter/adapter_model.safetensors": "b",
}


ENTRY = {".": "config.json", "adapter": "adapter/adapter_config.json"}


class Killed(BaseException):
    """The end of the process: nothing is done after it, also in no `finally`."""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def place(folder: Path, files: dict[str, str]) -> None:
    write(begin(folder), files)
    commit(folder)


def read(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def visible(folder: Path) -> dict[str, str]:
    """Files of a model that a reader would take."""
    return {name: text for name, text in read(folder).items() if not name.startswith(".")}


def files_in(place: str, files: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in files.items() if str(Path(name).parent) == place}


def killed_at_each_operation(folder: Path, files: dict[str, str]) -> Iterator[tuple[Path, int]]:
    """Place a model in copies of the folder; the n-th operation of the n-th is never made."""
    number, done = 0, False
    while not done:
        copy = folder.with_name(f"killed-{number}")
        shutil.copytree(folder, copy)
        with pytest.MonkeyPatch.context() as patch:
            done = arm(patch, copy, files, number)
        if not done:
            yield copy, number
        number += 1
    assert number > 15


def arm(patch: pytest.MonkeyPatch, folder: Path, files: dict[str, str], last: int) -> bool:
    """Tell whether the model was placed within so many operations."""
    made = []
    for name in OPERATIONS:
        original = (lambda _: None) if name == "fsync" else getattr(os, name)

        def counted(*args, original=original, **kwargs):
            if len(made) >= last:
                made.append(None)
                raise Killed
            made.append(None)
            return original(*args, **kwargs)

        patch.setattr(os, name, counted)
    try:
        place(folder, files)
    except Killed:
        return False
    return True


CHANGES = {
    "first": ({}, BOTH),
    "weights": (ONE, AGAIN),
    "to shards": (ONE, SHARDS),
    "all": (BOTH, SHARDS),
    "from shards": (SHARDS, ONE),
    "adapter goes": (BOTH, AGAIN),
}


@pytest.mark.parametrize("name", tiers(CHANGES, core=["from shards"]))
def test_a_kill_leaves_one_model_and_the_next_start_completes_it(tmp_path: Path, name: str):
    out, (old, new) = tmp_path / "out", CHANGES[name]
    write(out, {**old, **USERS})
    states = []
    for folder, number in killed_at_each_operation(out, new):
        found = visible(folder)
        assert {name: found.pop(name) for name in USERS} == USERS, number
        for place in (".", "adapter"):  # each holds a model of its own for a reader
            inside, models = files_in(place, found), [files_in(place, m) for m in (old, new)]
            assert any(inside.items() <= model.items() for model in models), (number, place)
            if ENTRY[place] in inside and ENTRY[place] in new:
                assert inside in models, (number, place)
        is_decided = (folder / ".model.new").exists() or found == new
        assert holds_model(folder) == bool(old or is_decided), number
        lines = repair(folder)
        assert repair(folder) == []
        assert read(folder) == {**USERS, **(new if is_decided else old)}, number
        states.append(tuple(line.rpartition(f"{folder}")[2] for line in lines))
    assert (": put the finished model of a killed run in place",) in states
    assert any(
        "/.model.tmp: removed, a killed run left it" in line for (line, *_) in filter(None, states)
    )
    assert states[0] == ()


def test_the_weights_alone_change_in_one_rename(tmp_path: Path):
    """The folder of a model that was trained again loads at every moment."""
    out = tmp_path / "out"
    write(out, ONE)
    found = [visible(folder) for folder, _ in killed_at_each_operation(out, AGAIN)]
    assert {model["model.safetensors"] for model in found} == {"one", "two"}
    assert all(model in (ONE, AGAIN) for model in found)


def test_what_is_not_the_models_is_not_touched(tmp_path: Path):
    out = tmp_path / "out"
    write(out, {**BOTH, **USERS})
    nodes = {name: (out / name).stat().st_ino for name in (*USERS, "notes", "checkpoints", "")}
    place(out, SHARDS)
    place(out, ONE)
    assert nodes == {name: (out / name).stat().st_ino for name in nodes}
    assert read(out) == {**ONE, **USERS}


@pytest.mark.parametrize("last", range(8, 24))
def test_further_chat_templates_are_the_models(tmp_path: Path, last: int):
    """They go with an older model, and those of the new one are there also after a kill."""
    templates = {f"{TEMPLATES}/{name}.jinja": name for name in ("rag", "tool_use")}
    place(tmp_path, {**ONE, f"{TEMPLATES}/old.jinja": "old"})
    write(tmp_path, USERS)
    with pytest.MonkeyPatch.context() as patch:
        arm(patch, tmp_path, {**AGAIN, **templates}, last)
    repair(tmp_path)
    found = read(tmp_path)
    old = {**ONE, f"{TEMPLATES}/old.jinja": "old"}
    assert found in ({**old, **USERS}, {**AGAIN, **templates, **USERS})
    place(tmp_path, {**AGAIN, **templates})
    assert read(tmp_path) == {**AGAIN, **templates, **USERS}
    place(tmp_path, ONE)
    assert read(tmp_path) == {**ONE, **USERS} and not (tmp_path / TEMPLATES).exists()


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch):
    """All files and folders are synced before the rename that decides, and names before config."""
    out, synced, events = tmp_path / "out", set(), []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(source, target) -> None:
        if Path(target).name == ".model.new":
            part = Path(source)
            assert synced >= {part, *part.rglob("*")}
        if Path(target).name in ("config.json", "adapter_config.json"):
            assert Path(target).parent in synced
        events.append(Path(target).name)
        synced.discard(Path(target).parent)
        real_rename(source, target)

    write(out, {"config.json": "older"})
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    place(out, SHARDS)
    assert synced >= {out, out / "adapter"}
    assert events[0] == ".model.new" and events[-1] == "config.json"
    assert events.index("adapter_config.json") > events.index("adapter_model.safetensors")


def test_the_name_of_a_new_folder_is_on_the_disk_as_well(tmp_path: Path, monkeypatch):
    """Of the output folder and of those above it that were made for it."""
    synced, real_sync = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    check_output_dir(str(tmp_path / "runs/one"))
    assert synced == {tmp_path, tmp_path / "runs"}
    synced.clear()
    begin(tmp_path / "runs/one/actor")
    assert synced == {tmp_path / "runs/one"}
    make_folder(tmp_path / "runs/one/actor")  # is there
    assert synced == {tmp_path / "runs/one"}


def test_what_is_dropped_leaves_the_old_model_alone(tmp_path: Path):
    out = tmp_path / "out"
    write(out, {**ONE, **USERS})
    write(begin(out), AGAIN)
    drop(out)
    assert read(out) == {**ONE, **USERS}


def test_an_adapter_that_takes_its_place_on_its_own(tmp_path: Path):
    """It comes before the merged weights, and is theirs when they come."""
    out, adapter = (
        tmp_path / "out",
        {"adapter_config.json": "rank", "adapter_model.safetensors": "a"},
    )
    write(out, {**ONE, **USERS})
    write(begin(out / "adapter"), adapter)
    (line,) = repair(out)
    assert line.startswith(f"{out}/adapter/.model.tmp: removed")
    assert read(out) == {**ONE, **USERS}
    place(out / "adapter", adapter)
    write(begin(out), AGAIN)
    commit(out, adapter=list(adapter))
    assert read(out) == {**AGAIN, **ADAPTER, **USERS}
    place(out, ONE)  # a model without one
    assert read(out) == {**ONE, **USERS}


def test_folders_that_earlier_versions_left_beside_the_output(tmp_path: Path):
    out = tmp_path / "out[1]"
    write(tmp_path / ".out[1].0a1b2c3d.tmp", ONE)
    write(tmp_path / ".out[1].0a1b2c3e.old", {**AGAIN, **USERS})
    write(tmp_path / ".out[1].backup.old", ONE)  # of somebody else
    lines = repair(out)
    assert read(out) == {**AGAIN, **USERS}
    assert len(lines) == 2 and "unfinished" in lines[0]
    assert lines[1].startswith(
        f"{out}: brought back from {tmp_path}/.out[1].0a1b2c3e.old: adapter,"
    )
    write(tmp_path / ".out[1].0a1b2c3d.old", {**BOTH, "training.log": "earlier", "extra": "e"})
    (line,) = repair(out)
    assert "extra; there as well are adapter" not in line
    assert line.endswith("there as well are training.log: keep what you need, and remove it")
    assert read(out) == {**AGAIN, **USERS, "extra": "e"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out[1].0a1b2c3d.old",
        ".out[1].backup.old",
        "out[1]",
    ]


def test_a_folder_may_be_a_link_the_working_folder_or_named_like_an_adapter(
    tmp_path: Path, monkeypatch
):
    real = tmp_path / "adapter"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    for out in (tmp_path / "link", Path("."), real):
        for model in (BOTH, ONE):
            place(out, model)
            assert read(real) == model
    assert (tmp_path / "link").is_symlink()
    assert placing.PART not in os.listdir(real)
