"""Put a complete model into its output folder, beside the files that are not the model's.

The folder itself and what else lies in it (logs, notes, checkpoints) are never moved or copied: a
model is written to FOLDER/.model.tmp and synced. Renaming that to FOLDER/.model.new decides: before
it the old model is in place, untouched; after it the new one counts, and its files take their
places one by one. What a kill interrupts there, `finish` completes at the next start, from the list
of files in the new folder.

A reader never finds files of two models together. Where one changed file decides (the weights of a
model that was trained again), its rename is the exchange. Where several do, config.json goes first,
then the other old files; the new ones come, config.json last. In between there is no model.
"""

from __future__ import annotations

import filecmp
import glob
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from dschat.models.reward_note import NOTE_FILE
from dschat.models.reward_statistics import EVALUATION_FILE, VALUE_FILE
from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.save_plan import ADAPTER_FOLDER, ENTRIES, LIST, READY, TEMPLATES
from dschat.utils.files import make_folder, remove, size_of, sync, sync_tree
from dschat.utils.module.adapter_config import CONFIG_FILE

PART = ".model.tmp"
# Files of the model in a folder: none of them may outlive a newer model there.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.bin"),
    *("config.json", "generation_config.json", CONFIG_FILE, "chat_template*", "merges.txt"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "vocab.txt", STATISTICS_FILE, VALUE_FILE, NOTE_FILE),
    *(EVALUATION_FILE, str(Path(EVALUATION_FILE).with_suffix(".png"))),
)
_WEIGHTS = (".safetensors", ".bin")  # too large to compare


def begin(folder: str | Path) -> Path:
    """Make an empty folder for a new model, which `commit` puts in place or `drop` removes."""
    folder = Path(folder)
    make_folder(folder)
    finish(folder)
    drop(folder)
    (folder / PART).mkdir()
    return folder / PART


def drop(folder: str | Path) -> None:
    """Remove an unfinished new model; the old one stays."""
    shutil.rmtree(Path(folder, PART), ignore_errors=True)


def commit(folder: str | Path, adapter: Sequence[str] = ()) -> None:
    """Put the model that was written since `begin` in its place.

    Args:
        adapter: names of files in FOLDER/adapter that belong to it and are in place already.
    """
    folder = Path(folder)
    part = folder / PART
    files = [path for path in part.rglob("*") if path.is_file()]
    for file in files:  # safetensors writes files that their owner alone reads
        file.chmod(part.stat().st_mode & 0o666)
    names = sorted(str(path.relative_to(part)) for path in files)
    everything = [*names, *(f"{ADAPTER_FOLDER}/{name}" for name in adapter)]
    (part / LIST).write_text(json.dumps(everything), encoding="utf-8")
    sync_tree(part)
    part.rename(folder / READY)
    sync(folder)
    finish(folder)


def finish(folder: Path) -> bool:
    """Put the files of a complete new model in place; continue where a killed run stopped.

    Returns:
        True where there was one.
    """
    ready = folder / READY
    if not ready.is_dir() or ready.is_symlink():
        return False
    is_whole = (ready / LIST).is_file()  # else all its files are in place already
    if is_whole:
        names = [Path(name) for name in json.loads((ready / LIST).read_text(encoding="utf-8"))]
        inner = {path.name for path in names if path.parent.name == ADAPTER_FOLDER}
        if inner:
            make_folder(folder / ADAPTER_FOLDER)
            _place(ready / ADAPTER_FOLDER, folder / ADAPTER_FOLDER, inner)
        elif (folder / ADAPTER_FOLDER / CONFIG_FILE).is_file():
            _remove_adapter(folder / ADAPTER_FOLDER)
        templates = {path.name for path in names if path.parts[0] == TEMPLATES}
        _place_templates(ready / TEMPLATES, folder / TEMPLATES, templates)
        _place(ready, folder, {path.name for path in names if path.parent.name == ""})
        (ready / LIST).unlink()
    shutil.rmtree(ready)
    return is_whole


def _place(source: Path, target: Path, names: set[str]) -> None:
    """Move these files from source to target, and remove an older model's from there."""
    stale = files_of_model(target) - names
    waiting = [name for name in names if (source / name).exists()]
    changed = [name for name in waiting if _differ(source / name, target / name)]
    gone = {*stale, *changed, *ENTRIES} if len(stale) + len(changed) > 1 else stale
    for name in sorted(gone, key=lambda name: name not in ENTRIES):
        (target / name).unlink(missing_ok=True)
        if name in ENTRIES:
            sync(target)
    for name in sorted(waiting, key=lambda name: name in ENTRIES):
        if name in ENTRIES:
            sync(target)
        (source / name).rename(target / name)
    sync(target)


def _place_templates(source: Path, target: Path, names: set[str]) -> None:
    """Move a model's further chat templates from source to target, and remove an older model's."""
    if target.is_symlink():  # nothing is written through it
        target.unlink()
    for stale in {path.name for path in target.glob("*.jinja")} - names:
        (target / stale).unlink()
    waiting = sorted(name for name in names if (source / name).exists())
    if waiting:
        make_folder(target)
    for name in waiting:
        (source / name).rename(target / name)
    if target.is_dir():
        sync(target)
        if not any(target.iterdir()):
            target.rmdir()


def _remove_adapter(folder: Path) -> None:
    """Remove an older model's adapter, its config last; what else lies in the folder stays."""
    for name in sorted(files_of_model(folder), key=lambda name: name in ENTRIES):
        (folder / name).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def files_of_model(folder: Path) -> set[str]:
    """Names of the files in a folder that are a model's."""
    return {path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}


def _differ(new: Path, old: Path) -> bool:
    is_weight = new.suffix in _WEIGHTS
    return is_weight or not old.is_file() or not filecmp.cmp(new, old, shallow=False)


def repair(folder: str | Path) -> list[str]:
    """Finish or remove what a killed run left of a model in this folder.

    Call it where no other run can be writing here.

    Returns:
        A line for each thing that was done.
    """
    folder, done = Path(folder), []
    if (folder / ADAPTER_FOLDER).is_dir() and folder.name != ADAPTER_FOLDER:
        done += repair(folder / ADAPTER_FOLDER)  # it is put in place on its own
    if finish(folder):
        done.append(f"{folder}: put the finished model of a killed run in place")
    for left in (folder / PART, folder / READY):
        if left.is_symlink() or left.exists():
            done.append(_removed(left))
    real = folder.resolve()
    pattern = re.compile(re.escape(f".{real.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    # Earlier versions moved the output folder aside for a moment, all that was in it included.
    beside = real.parent.glob(f".{glob.escape(real.name)}.*") if real.parent.is_dir() else ()
    for left in sorted(path for path in beside if pattern.fullmatch(path.name)):
        done.append(_brought_back(left, real) if left.suffix == ".old" else _removed(left))
    return done


def _brought_back(aside: Path, folder: Path) -> str:
    """Move what `folder` lacks back from where it was moved aside to, and remove the older model.

    A file that stands in both places stays in both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in ENTRIES):
        for name in files_of_model(aside):
            (aside / name).unlink()
        if (aside / ADAPTER_FOLDER / CONFIG_FILE).is_file():
            _remove_adapter(aside / ADAPTER_FOLDER)
    lacking = sorted(p.name for p in aside.iterdir() if not (folder / p.name).exists())
    for name in lacking:
        (aside / name).rename(folder / name)
    sync(folder)
    line = f"{folder}: brought back from {aside}: {', '.join(lacking) or 'nothing'}"
    if more := sorted(path.name for path in aside.iterdir()):
        return f"{line}; there as well are {', '.join(more)}: keep what you need, and remove it"
    aside.rmdir()
    return line


def _removed(left: Path) -> str:
    size = size_of(left)
    remove(left)
    return f"{left}: removed, a killed run left it unfinished ({size / 1e6:,.1f} MB)"
