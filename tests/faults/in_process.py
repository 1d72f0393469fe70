"""Every file that a resume verifies, damaged in every way, without a start of a program for each.

The functions that a resume calls are called here: `find_checkpoint` by each rank for a checkpoint;
`RunPlan.check_continues`, `check_model_folder` and the loading of weights with `frozen_checksum`
for a model folder; `written_once` for tokenised data; `MetricLogger` and `AnswerFile` for the files
that a resumed run appends to. `verdicts.damage` holds their answer against that of a whole start.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from dschat.config.cli import parse
from dschat.config.rlhf import RLHFSettings
from dschat.config.steps import DPOSettings, RewardSettings, SFTSettings
from dschat.data import cache
from dschat.errors import UserError
from dschat.models.causal_lm import check_model_folder, create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.report.records import ANSWERS, HELD_OUT, METRICS
from dschat.rlhf.answers import AnswerFile
from dschat.settings import Settings
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train import checkpoint_folder
from dschat.train.checkpoint_config import CheckpointConfig
from dschat.train.checkpoint_source import find_checkpoint
from dschat.train.checksums import frozen_checksum
from dschat.train.metrics import Continued, LogConfig, MetricLogger
from dschat.train.resume import RunPlan, model_files
from dschat.train.steps import StepPlan
from dschat.utils.distributed import Distributed
from tests.faults.damages import damages_of, put
from tests.faults.programs import OUTPUT, Layout

SETTINGS: dict[str, type[Settings]] = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
    "ppo": RLHFSettings,
}
FOUND, SAME, UNDETECTED = "found", "same content", "undetected"


@dataclass
class Sweep:
    """What came of damaging every file of some folders.

    Attributes:
        outcomes: number of damages by what became of them. complaints: those that were undetected,
            or found without the file's name.
    """

    files: int = 0
    outcomes: dict[str, int] = field(default_factory=lambda: {FOUND: 0, SAME: 0, UNDETECTED: 0})
    complaints: list[str] = field(default_factory=list)


class Place(Protocol):
    """Files of one kind in the folder of a stopped run, and what a resume does with them."""

    files: list[Path]

    def sibling(self, file: Path) -> Path | None:
        """Find the file that stands in its place in another folder."""

    def said(self) -> str | None:
        """Do what a resume does; return what it says of damage, None where it says nothing."""

    def is_same(self) -> bool:
        """Tell whether what a resume reads is what was there before the damage."""


def sweep(place: Place, only: tuple[str, ...] = ()) -> Sweep:
    """Damage each file in every way, or in those named alone; put it back each time.

    Raises:
        RuntimeError: a resume would find damage where there is none.
    """
    found = Sweep(files=len(place.files))
    if (said := place.said()) is not None or not place.is_same():
        raise RuntimeError(f"undamaged, and yet: {said}")
    for file in place.files:
        content, other = file.read_bytes(), place.sibling(file)
        sibling = other.read_bytes() if other is not None and other.is_file() else None
        for how, damaged in damages_of(content, sibling):
            if only and how.split()[0] not in only:
                continue
            put(file, damaged)
            try:
                outcome = judged(place, file)
            except Exception as error:  # a resume would end in a traceback
                outcome = f"{type(error).__name__}: {error}"
            finally:
                put(file, content)
            kind = outcome if outcome in found.outcomes else UNDETECTED
            found.outcomes[kind] += 1
            if kind == UNDETECTED:
                found.complaints.append(f"{how} of {file.parent.name}/{file.name}: {outcome}")
    return found


def judged(place: Place, file: Path) -> str:
    """Say what a resume makes of the present damage of a file."""
    said = place.said()
    if said is None:
        return SAME if place.is_same() else UNDETECTED
    named = file.name in said or file.parent.name in said
    return FOUND if named else f"found, but not named: {said}"


@dataclass
class Checkpoints:
    """The newest of a run's checkpoints; an older one stands in for it where it is damaged."""

    folder: Path
    ranks: int

    def __post_init__(self) -> None:
        self.output = self.folder / OUTPUT
        present = checkpoint_folder.checkpoints_in(self.output / "checkpoints")
        *older, self.newest = present.values()
        self.older = older[-1] if older else None
        self.files = sorted(path for path in self.newest.rglob("*") if path.is_file())
        self.record = checkpoint_folder.read_record(self.newest)

    def sibling(self, file: Path) -> Path | None:
        """Find it in the older checkpoint."""
        return None if self.older is None else self.older / file.relative_to(self.newest)

    def said(self) -> str | None:
        """Find the checkpoint as each rank does, which reads its share of the files."""
        config = CheckpointConfig(resume=checkpoint_folder.NEWEST)
        for rank in range(self.ranks):
            process = Distributed(rank, self.ranks, rank, torch.device("cpu"))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                try:
                    found = find_checkpoint(config, str(self.output), ANY_PLAN, process)
                except UserError as error:
                    return str(error)
            assert found is not None
            if found.folder != self.newest:
                return printed.getvalue()
        return None

    def is_same(self) -> bool:
        """Compare the record; all other bytes have digests in it."""
        return checkpoint_folder.read_record(self.newest) == self.record


class _AnyPlan(RunPlan):
    """A plan that continues any checkpoint."""

    def __init__(self) -> None:
        pass

    def check_continues(self, *_: object) -> None:
        """Find no difference."""


ANY_PLAN = _AnyPlan()


class Models:
    """A model folder that a run with these checkpoints began with."""

    def __init__(self, folder: Path, layout: Layout, name: str):
        self.folder, self.layout, self.name = folder, layout, name
        program = layout.program.partition("-")[0]
        with contextlib.chdir(folder):
            self.settings = parse(SETTINGS[program], layout.argv()[1:], "")
            self.before = model_files(self.settings)
        self.creates_head = program == "reward"
        self.is_critic = self.creates_head or name == "critic"
        self.files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        self.content = self._content()

    def sibling(self, file: Path) -> Path | None:
        """Find it in another model's folder."""
        return self.folder / "older" / file.name

    def said(self) -> str | None:
        """Compare small files, check the folder, load the weights and compare their checksum."""
        with contextlib.chdir(self.folder):
            try:
                self._plan(model_files(self.settings))._check_model_files("S", self.before)
                module = self._loaded()
            except UserError as error:
                return str(error)
        same = frozen_checksum(module) == self.content[0]
        return None if same else f"the frozen weights of {self.name} are not those"

    def _plan(self, files: dict) -> RunPlan:
        steps = StepPlan(total_steps=1, epoch_steps=(1,), batches_per_step=1)
        return RunPlan("", self.settings, {}, "fp32", "", steps, model_files=files)

    def _loaded(self) -> nn.Module:
        tokenizer = load_hf_tokenizer(self.name)
        check_model_folder(self.name, tokenizer)
        if self.is_critic:
            torch.manual_seed(0)  # of a head that is made anew
            module = create_critic_model(
                self.name, tokenizer, torch.float32, init_head=self.creates_head
            )
        else:
            module = create_hf_model(self.name, tokenizer, torch.float32)
        return module.requires_grad_(False)

    def _content(self) -> tuple[str, dict[str, bytes]]:
        """Checksum, and the bytes of each tensor: the one shows what the other would miss."""
        with contextlib.chdir(self.folder):
            module = self._loaded()
        state = {n: t.contiguous().numpy().tobytes() for n, t in module.state_dict().items()}
        return frozen_checksum(module), state

    def is_same(self) -> bool:
        """Compare every tensor, bit for bit; small files have digests."""
        return self._content() == self.content


class Cached:
    """The tokenised sets of a run."""

    def __init__(self, folder: Path, scratch: Path):
        self.root, self.scratch = folder / "cache", scratch
        self.sets = sorted(path.parent for path in self.root.rglob(cache.RECORD))
        self.files = sorted(path for own in self.sets for path in own.rglob("*") if path.is_file())
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.root, scratch)
        self.made: list[str] = []

    def sibling(self, file: Path) -> Path | None:
        """Find it in another set."""
        others = (own / file.name for own in self.sets if own != file.parent)
        return next((path for path in others if path.is_file()), None)

    def said(self) -> str | None:
        """Open each set as a run does; what is damaged is made again, from a copy here."""
        printed, made = io.StringIO(), []
        for own in self.sets:
            kind, key = own.parent.name, own.name

            def write(part: Path, kind: str = kind, key: str = key) -> None:
                made.append(key)
                for path in (self.scratch / kind / key).iterdir():
                    if path.name != cache.RECORD:
                        shutil.copyfile(path, part / path.name)

            with contextlib.redirect_stdout(printed):
                cache.written_once(self.root, kind, key, write)
        return printed.getvalue() if made else None

    def is_same(self) -> bool:
        """Compare all bytes but those of the records, which hold digests and keys."""
        return all(
            path.read_bytes() == (self.scratch / path.relative_to(self.root)).read_bytes()
            for path in self.files
            if path.name != cache.RECORD
        )


class Appended:
    """Files in the output folder that a resumed run goes on with, restored from its checkpoint."""

    def __init__(self, folder: Path):
        self.output = folder / OUTPUT
        present = checkpoint_folder.checkpoints_in(self.output / "checkpoints")
        self.newest, self.step = present[max(present)], max(present)
        names = (METRICS, ANSWERS, HELD_OUT)
        self.files = [self.output / name for name in names if (self.output / name).is_file()]
        self.resume()
        self.restored = {file: file.read_bytes() for file in self.files}

    def sibling(self, file: Path) -> Path | None:
        """Take another file of lines."""
        return self.files[self.files.index(file) - 1]

    def resume(self) -> None:
        """Open the files as a resumed run does."""
        for path in self.output.glob("*.[0-9].jsonl"):
            path.unlink()
        continued = Continued(self.newest / METRICS, self.step)
        with contextlib.redirect_stdout(io.StringIO()):
            MetricLogger(LogConfig(no_report=True), self.output, 0, continued).close()
        for name in (ANSWERS, HELD_OUT):
            if self.output / name in self.files:
                with contextlib.redirect_stdout(io.StringIO()):
                    AnswerFile(self.output, self.step, name, self.newest / name)

    def said(self) -> str | None:
        """Resume; a damaged file is set aside under a number."""
        self.resume()
        aside = sorted(path.name for path in self.output.glob("*.[0-9].jsonl"))
        return " ".join(f"{name.split('.')[0]}.jsonl" for name in aside) or None

    def is_same(self) -> bool:
        """Compare what the run goes on with."""
        return all(file.read_bytes() == content for file, content in self.restored.items())


def places(target: str, folder: Path, layout: Layout, scratch: Path) -> Iterator[Place]:
    """Yield what a target names in the folder of a stopped run, which is written to."""
    if target == "checkpoint":
        yield Checkpoints(folder, layout.ranks)
    elif target == "model":
        for name in layout.record.models:
            yield Models(folder, layout, name)
    elif target == "cache":
        yield Cached(folder, scratch)
    else:
        yield Appended(folder)
