"""Training states: a run that was killed goes on as if it had never stopped, bit for bit.

A state is DeepSpeed's own checkpoint of every engine (weights that train, optimizer, schedule), the
random generators of every rank, the place in the data, and what the training log, PPO and the
moving average hold. Frozen weights stay out: they come from the model folder again, and a checksum
says whether they are the same. `state.json` is for people, and for the checks before a resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dschat.train import checkpoint_folder
from dschat.train.metrics import Continued
from dschat.train.resume_checks import (
    check_frozen,
    check_groups,
    check_restored_rates,
    frozen_checksum,
    set_rates,
)
from dschat.train.run_plan import Plan, check_plan
from dschat.utils.distributed import (
    Distributed,
    RandomState,
    barrier,
    from_main,
    print_rank_0,
)
from dschat.utils.optim import group_rates

METRICS = "metrics.jsonl"


class Stateful(Protocol):
    """Something beside the engines that a state holds."""

    per_rank: bool  # whether ranks differ in it

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again."""


@dataclass(frozen=True)
class StateConfig:
    """When states are written, how many stay, and what the run resumes from."""

    output_dir: str | None = None
    save_steps: int = 0  # 0: never
    save_total_limit: int = 1
    resume: str | None = None  # a state's folder, or `checkpoint_folder.NEWEST`
    with_new_rates: bool = False

    @property
    def in_use(self) -> bool:
        """Whether there is anything to do."""
        return self.save_steps > 0 or self.resume is not None


@dataclass(frozen=True)
class Position:
    """How far a run has come: steps (in step 3 iterations), epoch, and batches of that epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def batches(self, epoch: int) -> int:
        """How many batches of an epoch are used up already."""
        return self.batch if epoch == self.epoch else 0


class Checkpointer:
    """Saves the states of one run, and restores the one that it resumes from.

    Every rank makes every call; all of them see the same folder.

    Raises:
        UserError: the state to resume from is broken, or is not of this run as planned.
    """

    def __init__(self, config: StateConfig, plan: Plan, distributed: Distributed):
        self.config, self.plan, self.distributed = config, plan, distributed
        self.engines: Mapping[str, nn.Module] = {}
        self.parts: Mapping[str, Stateful] = {}
        self._checksums: dict[str, str] = {}
        self._source, self._record = None, None
        if config.in_use:
            self._source, self._record = from_main(self._open)
        if self._source is None and config.resume is not None:
            folder = checkpoint_folder.states_of(config.output_dir)
            print_rank_0(f"--resume: no training state in {folder}, starting from the beginning")

    def _open(self) -> tuple[Path | None, dict[str, Any] | None]:
        config = self.config
        checkpoint_folder.repair(config.output_dir)
        source = checkpoint_folder.choose(config.output_dir, config.resume, config.save_steps > 0)
        if source is None:
            return None, None
        record = checkpoint_folder.read_record(source)
        world_size = self.distributed.world_size
        check_plan(str(source), record, self.plan, world_size, config.with_new_rates)
        return source, record

    @property
    def continued(self) -> Continued | None:
        """What the metrics of a resumed run go on from."""
        if self._source is None:
            return None
        return Continued(self._source / METRICS, self._record["step"])

    def restore(
        self,
        engines: Mapping[str, nn.Module],
        parts: Mapping[str, Stateful | None],
        frozen: Mapping[str, nn.Module | None] | None = None,
    ) -> Position:
        """Fill everything from the state that the run resumes from, and say where to go on.

        The last thing before the loop: the random generators are put back as well. Without a state
        to resume from nothing changes.

        Args:
            parts: what else is saved. frozen: modules beside the engines that must be the same.
        """
        self.engines = engines
        self.parts = {k: p for k, p in {**parts, "random": RandomState()}.items() if p is not None}
        if not self.config.in_use:
            return Position()
        modules = {name: engine.module for name, engine in engines.items()}
        modules |= {name: m for name, m in (frozen or {}).items() if m is not None}
        self._checksums = {name: frozen_checksum(module) for name, module in modules.items()}
        if self._source is None:
            return Position()
        place = str(self._source)
        check_frozen(place, self._record["frozen_weights"], self._checksums)
        for name, engine in engines.items():
            self._restore_engine(place, name, engine)
        for name, part in self.parts.items():
            file = self._source / self._part_file(name, part)
            part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        position = Position(*(self._record[k] for k in ("step", "epoch", "batch")))
        print_rank_0(f"resumed from {place} at step {position.step}")
        return position

    def _restore_engine(self, place: str, name: str, engine: nn.Module) -> None:
        config = self.plan.engines[name].optimizer
        check_groups(place, name, self._record["engines"][name]["peak_rates"], engine.optimizer)
        loaded, _ = engine.load_checkpoint(place, tag=name, custom_load_fn=_load_trained)
        if loaded is None:  # DeepSpeed says no more than that
            raise RuntimeError(f"{place}: DeepSpeed found nothing to load for the {name}")
        if self.config.with_new_rates:
            set_rates(engine.optimizer, engine.lr_scheduler, config)
        check_restored_rates(engine.optimizer, engine.lr_scheduler, config)

    def save_if_due(self, step: int, epoch: int) -> None:
        """Save after every `save_steps`-th step, when everything of the step has been done."""
        if self.config.save_steps and step % self.config.save_steps == 0:
            batch = self.plan.steps.batches_of(step, epoch)
            self.save(Position(step, epoch, batch))

    def save(self, position: Position) -> None:
        """Write a state; under its name it appears when it is whole, and only then do others go."""
        folder, step = checkpoint_folder.states_of(self.config.output_dir), position.step
        part = checkpoint_folder.part_path(folder, step)
        if self.distributed.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        for name, engine in self.engines.items():
            engine.save_checkpoint(
                str(part), tag=name, save_latest=False, exclude_frozen_parameters=True
            )
        for name, other in self.parts.items():
            if other.per_rank or self.distributed.is_main:
                torch.save(other.state_dict(), part / self._part_file(name, other))
        barrier()
        if self.distributed.is_main:
            self._check_seen(part)
            shutil.copyfile(Path(self.config.output_dir) / METRICS, part / METRICS)
            checkpoint_folder.write_record(part, self._describe(position))
            checkpoint_folder.publish(folder, step, self.config.save_total_limit)

    def _part_file(self, name: str, part: Stateful) -> str:
        rank = f"-rank-{self.distributed.rank:04d}" if part.per_rank else ""
        return f"{name}{rank}.pt"

    def _check_seen(self, part: Path) -> None:
        """Stop when other nodes write to a disk of their own: their part would be missing."""
        seen, wanted = len(list(part.glob("random-rank-*.pt"))), self.distributed.world_size
        if seen != wanted:
            raise RuntimeError(f"{part}: {seen} of {wanted} ranks wrote here; share output_dir")

    def _describe(self, position: Position) -> dict[str, Any]:
        groups = {name: list(group_rates(e.optimizer)) for name, e in self.engines.items()}
        return {
            **vars(position),
            **self.plan.record(groups, self.distributed.world_size),
            "frozen_weights": self._checksums,
        }


def _load_trained(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Load a checkpoint without frozen weights; nothing that trains may be missing from it.

    Raises:
        RuntimeError: names or shapes differ.
    """
    result = dst.load_state_dict(src, strict=False)
    trained = {name for name, p in dst.named_parameters() if p.requires_grad}
    missing = trained.intersection(result.missing_keys)
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"training state: missing {sorted(missing)}, unexpected {result.unexpected_keys}"
        )
