"""Write a checkpoint on all ranks: whole, or not at all and one line on all of them."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dschat.errors import UserError
from dschat.report.records import METRICS
from dschat.train import checkpoint_folder
from dschat.train.checkpoint_folder import disk_errors
from dschat.train.engine import Engine
from dschat.train.line_files import KEPT
from dschat.utils.distributed import Distributed, all_gather, on_every_rank
from dschat.utils.files import disk_error, make_folder, remove
from dschat.utils.places import working
from dschat.utils.waiting import from_waiting_main


class Stateful(Protocol):
    """An object beside the engines whose state a checkpoint holds."""

    per_rank: bool  # True: the state differs between ranks

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and texts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of.

    Attributes:
        states: what this rank writes beside the engines, by the file's name.
        record: for `state.json`.
    """

    engines: Mapping[str, Engine]
    states: Mapping[str, Stateful]
    record: dict[str, Any]


def write_checkpoint(
    output_dir: str, step: int, contents: Contents, limit: int, distributed: Distributed
) -> None:
    """Write a checkpoint; it appears under its name when complete, and older ones go then.

    Every rank makes the call. No rank waits in a collective while rank 0 works alone.

    Args:
        limit: keep so many, the newest.

    Raises:
        UserError: on every rank, where the disk did not take it; older ones stay.
    """
    folder = checkpoint_folder.folder_of(output_dir)
    part = checkpoint_folder.unfinished_path(folder, step)

    def begin() -> str:
        if not Path(output_dir).is_dir():  # somebody removed it: what is written there is unwanted
            raise FileNotFoundError(errno.ENOENT, "removed", output_dir)
        remove(part)
        make_folder(part)
        return ""

    def complete() -> str:
        _check_all_wrote(part, distributed.world_size)
        for name in KEPT:
            if (file := Path(output_dir) / name).is_file():
                shutil.copyfile(file, part / name)
        (part / METRICS).touch()  # where somebody removed it
        return json.dumps(checkpoint_folder.names_in(part))

    def publish() -> str:
        checkpoint_folder.write_record(part, contents.record, dict(sorted(together.items())))
        checkpoint_folder.publish(folder, step, limit)
        return ""

    named = functools.partial(_named, output_dir)
    try:
        from_waiting_main(named(begin))
        on_every_rank(named(functools.partial(_write, part, contents)))
        names = json.loads(from_waiting_main(named(complete)))
        mine = names[distributed.rank :: distributed.world_size]
        digests = functools.partial(checkpoint_folder.digests_of, part, mine)
        together = {n: d for of in all_gather(on_every_rank(named(digests))) for n, d in of.items()}
        from_waiting_main(named(publish))
    except UserError:
        if distributed.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _named(output_dir: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap work whose errors of the disk become one line."""

    def run() -> Any:
        with disk_errors(output_dir):
            return work()

    return run


def _write(part: Path, contents: Contents) -> None:
    """Write this rank's files; an error is raised when the others no longer wait for this rank."""
    failed: list[Exception] = []
    for name, engine in contents.engines.items():
        with _errors_kept(engine, failed), frozen_left_out(engine):
            engine.save_checkpoint(
                str(part), tag=name, save_latest=False, exclude_frozen_parameters=True
            )
    if failed:
        raise failed[0]
    for name, state in contents.states.items():
        _save(state.state_dict(), part / name)


def _save(state_dict: dict[str, Any], path: str | Path, zipped: bool = True) -> None:
    try:
        # The other ranks wait inside DeepSpeed. Given a path, torch would hide the system's reason.
        with working(), open(path, "wb") as file:
            torch.save(state_dict, file, _use_new_zipfile_serialization=zipped)
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


@contextlib.contextmanager
def frozen_left_out(engine: Engine) -> Iterator[None]:
    """Make an engine leave frozen weights out of its files, under all their names.

    DeepSpeed leaves a tied weight out once, and writes it under its other name.
    """
    names = engine.module.named_parameters(remove_duplicate=False)
    frozen = [name for name, parameter in names if not parameter.requires_grad]
    original = engine.module_state_dict

    def trained(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        state = original(*args, **kwargs)
        for name in frozen:
            state.pop(name, None)
        return state

    engine.module_state_dict = trained
    try:
        yield
    finally:
        del engine.module_state_dict


@contextlib.contextmanager
def _errors_kept(engine: Engine, failed: list[Exception]) -> Iterator[None]:
    """Let an engine finish its save although writing fails.

    DeepSpeed's ranks wait for each other inside: one that left would leave the others there.
    """

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except Exception as error:
                found = disk_error(error)
                if found is None:
                    raise
                found.filename = found.filename or kwargs.get("path")
                failed.append(found)

        return call

    writer = engine.checkpoint_engine
    save = writer.save
    if hasattr(writer, "zipfile_serialization"):  # the one that writes by torch.save
        save = functools.partial(_save, zipped=writer.zipfile_serialization)
    script = engine._copy_recovery_script
    calls = [(writer, "save", save), (writer, "makedirs", writer.makedirs)]
    calls.append((engine, "_copy_recovery_script", script))
    before = [vars(owner).get(name) for owner, name, _ in calls]
    for owner, name, call in calls:
        setattr(owner, name, kept(call))
    try:
        yield
    finally:
        for (owner, name, _), old in zip(calls, before, strict=True):
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def _check_all_wrote(part: Path, ranks: int) -> None:
    """Raise an error when other nodes write to a disk of their own: their files would be missing.

    Raises:
        UserError: with the number of ranks that wrote here.
    """
    present = len(list(part.glob("random-rank-*.pt")))
    if present != ranks:
        raise UserError(f"{part}: {present} of {ranks} ranks wrote here; share output_dir")
