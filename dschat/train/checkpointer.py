"""Checkpoints: a killed run resumes as if it had never stopped, bit for bit.

A checkpoint is DeepSpeed's own of every engine (weights that train, optimizer, schedule), the
random generators of every rank, the position in the data, and the state of the training log, of PPO
and of the moving average. Frozen weights are left out: they come from the model folder again, and a
checksum tells whether they are the same. `state.json` is for people, and for the checks before a
resume.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from dschat.errors import UserError
from dschat.report.records import METRICS
from dschat.settings import flag_values
from dschat.train import checkpoint_folder, phases, run_end, signals
from dschat.train.checkpoint_config import CheckpointConfig
from dschat.train.checkpoint_source import Checkpoint, Position, find_checkpoint
from dschat.train.checkpoint_write import Contents, Stateful, write_checkpoint
from dschat.train.checksums import frozen_checksum
from dschat.train.engine import Engine
from dschat.train.metrics import Continued
from dschat.train.portable_restore import restore_portable, start_generators_anew
from dschat.train.resume import RunPlan
from dschat.train.resume_engines import (
    check_restored_rates,
    check_same_frozen,
    check_same_groups,
    named_groups,
    set_peak_rates,
)
from dschat.train.safe_load import load_file, make_loading_safe
from dschat.utils.distributed import (
    Distributed,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    print_rank_0,
)
from dschat.utils.places import in_step
from dschat.utils.random_state import RandomState
from dschat.utils.zero import local_values


class Checkpointer:
    """Saves the checkpoints of one run, and restores the one that it resumes from.

    Every rank makes every call; all of them see the same folder.

    Raises:
        UserError: the checkpoint to resume from is broken, or is not of this run as planned.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        output_dir: str,
        plan: RunPlan,
        distributed: Distributed,
    ):
        self.config, self.plan, self.distributed = config, plan, distributed
        self.output_dir = output_dir
        self.engines: Mapping[str, Engine] = {}
        self.others: Mapping[str, Stateful] = {}
        self._modules: dict[str, nn.Module] = {}
        self._source = find_checkpoint(config, output_dir, plan, distributed)
        if self._source is None and config.resume is not None:
            folder = checkpoint_folder.folder_of(self.output_dir)
            print_rank_0(f"resume: no checkpoint in {folder}, starting from the beginning")

    @property
    def continued(self) -> Continued | None:
        """Metrics file and step to append to; of a resumed run without a checkpoint, none."""
        if self._source is None:
            return None if self.config.resume is None else Continued(None, 0)
        return Continued(self._source.folder / METRICS, self._source.position.step)

    def restore(
        self,
        engines: Mapping[str, Engine],
        others: Mapping[str, Stateful | None],
        frozen: Mapping[str, nn.Module | None] | None = None,
    ) -> Position:
        """Fill everything from the checkpoint that the run resumes from; return where it was.

        The last call before the loop: the random generators are restored as well, and signals wait
        for the end of a step from here. Without a checkpoint nothing else changes.

        Args:
            others: what is saved beside the engines. frozen: modules beside them that must be the
                same.
        """
        self.engines = engines
        everything = {**others, "random": RandomState()}
        self.others = {name: other for name, other in everything.items() if other is not None}
        self._modules = {name: engine.module for name, engine in engines.items()}
        self._modules |= {name: m for name, m in (frozen or {}).items() if m is not None}
        signals.finish_steps()
        in_step(1 if self._source is None else self._source.position.step + 1)
        if self._source is None:
            return Position()
        folder, record = self._source.folder, self._source.record
        check_same_frozen(str(folder), record["frozen_weights"], self._checksums)
        for name, engine in engines.items():
            check_same_groups(
                str(folder), name, record["engines"][name]["peak_rates"], engine.optimizer
            )
            self._restore_engine(self._source, name, engine)
        for name, other in self.others.items():
            self._restore_other(self._source, name, other)
        position = self._source.position
        if self._source.is_portable:
            batch = self.plan.steps.batches_of(position.step, position.epoch)
            position = Position(position.step, position.epoch, batch)
        print_rank_0(f"resumed from {folder} at step {position.step}")
        return position

    @functools.cached_property
    def _checksums(self) -> dict[str, str]:
        """Checksums of all frozen weights, which no step changes."""
        return {name: frozen_checksum(module) for name, module in self._modules.items()}

    def _restore_other(self, source: Checkpoint, name: str, other: Stateful) -> None:
        file = self._file(name, other)
        if source.is_portable:
            ranks = source.record["processes"]
            if name == "random" and ranks != self.distributed.world_size:
                seed = int(flag_values(self.plan.settings)["seed"])
                start_generators_anew(seed, source.position.step, ranks, self.distributed)
                return
            file = file if name == "random" else f"{name}.pt"
        other.load_state_dict(load_file(str(source.folder / file)))

    def _restore_engine(self, source: Checkpoint, name: str, engine: Engine) -> None:
        optimizer = self.plan.optimizers[name]
        if source.is_portable:
            restore_portable(engine, source.folder, name)
        else:
            place = str(source.folder)
            make_loading_safe(engine)
            path, _ = engine.load_checkpoint(place, tag=name, custom_load_fn=_load_trained)
            if path is None:  # DeepSpeed says no more than that
                raise RuntimeError(f"{place}: DeepSpeed found nothing to load for the {name}")
        if self.config.resume_with_new_rates:
            set_peak_rates(engine.optimizer, engine.lr_scheduler, optimizer)
        check_restored_rates(engine.optimizer, engine.lr_scheduler, optimizer)

    def save_if_due(self, step: int, epoch: int) -> None:
        """Save after every `save_steps`-th step, when everything of the step has been done.

        Raises:
            Stopped: on every rank, when a signal has reached any of them; that saves as well.
        """
        signum = int(all_reduce_max([signals.requested()])[0])
        counted = len(self.plan.steps.epoch_steps) > 0  # else nobody could resume
        interval = self.config.save_steps
        if (interval and step % interval == 0) or (signum and counted):
            batch = self.plan.steps.batches_of(step, epoch)
            self.save(Position(step, epoch, batch))
            phases.mark(phases.CHECKPOINTS)
        if signum:
            barrier()  # a launcher ends all ranks when the first one ends
            folder = str(checkpoint_folder.path_of(self.output_dir, step))
            raise signals.Stopped(signum, step, folder if counted else None)
        in_step(step + 1)

    def save(self, position: Position) -> None:
        """Write a checkpoint; it appears under its name when complete, and older ones go then.

        Raises:
            UserError: weights that are not finite, or a disk that does not take them; older
                checkpoints stay.
        """
        for name, engine in self.engines.items():
            check_weights(name, engine.module, position.step)
        groups = {
            name: named_groups(engine.module, self.plan.optimizers[name])
            for name, engine in self.engines.items()
        }
        plan = self.plan.record(groups, self.distributed.world_size)
        # ZeRO-3 gathers for the checksums, which every rank must do.
        record = {**vars(position), **plan, "frozen_weights": self._checksums}
        states = {
            self._file(name, other): other
            for name, other in self.others.items()
            if other.per_rank or self.distributed.is_main
        }
        contents, limit = Contents(self.engines, states, record), self.config.save_total_limit
        write_checkpoint(self.output_dir, position.step, contents, limit, self.distributed)

    def mark_end(self) -> None:
        """Note that the run's model is written; a pipeline passes over what has ended."""
        if self.distributed.is_main:
            run_end.mark_end(self.output_dir)

    def _file(self, name: str, other: Stateful) -> str:
        rank = f"-rank-{self.distributed.rank:04d}" if other.per_rank else ""
        return f"{name}{rank}.pt"


def check_weights(name: str, module: nn.Module, step: int) -> None:
    """Refuse trained weights that are not finite.

    Raises:
        UserError: on every rank.
    """
    trained = (local_values(p) for p in module.parameters() if p.requires_grad)
    (broken,) = all_reduce_sum([float(sum(not torch.isfinite(w).all() for w in trained))])
    if broken:
        raise UserError(
            f"step {step}: weights of the {name} are not finite and are not saved; resume from an "
            "earlier checkpoint with a lower learning rate"
        )


def _load_trained(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Load a state dict without frozen weights; nothing that trains may be missing from it.

    Raises:
        RuntimeError: names or shapes differ.
    """
    result = dst.load_state_dict(src, strict=False)
    trained = {name for name, p in dst.named_parameters() if p.requires_grad}
    missing = trained.intersection(result.missing_keys)
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"checkpoint: missing {sorted(missing)}, unexpected {result.unexpected_keys}"
        )
