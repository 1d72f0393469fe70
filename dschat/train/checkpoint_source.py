"""The checkpoint that a run resumes from: found and checked, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.train import checkpoint_folder
from dschat.train.checkpoint_config import CheckpointConfig
from dschat.train.resume import RunPlan
from dschat.utils.distributed import Distributed, from_main, on_every_rank, print_rank_0


@dataclass(frozen=True)
class Position:
    """Progress of a run: steps (in step 3 iterations), epoch, and batches of that epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def batches(self, epoch: int) -> int:
        """Batches of an epoch that are used up already."""
        return self.batch if epoch == self.epoch else 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, checked: its folder and its record."""

    folder: Path
    record: dict[str, Any]

    @property
    def is_portable(self) -> bool:
        """Return whether it is by the names of parameters, not by ranks."""
        return bool(self.record.get("portable"))

    @property
    def position(self) -> Position:
        """Progress of the run when it was saved."""
        return Position(*(self.record[name] for name in ("step", "epoch", "batch")))


def find_checkpoint(
    config: CheckpointConfig, output_dir: str, plan: RunPlan, distributed: Distributed
) -> Checkpoint | None:
    """Find the checkpoint to resume from; a damaged newest gives way to the one before it.

    Raises:
        UserError: all are damaged, or it is not of this run as planned.
    """
    folders = from_main(partial(checkpoint_folder.choose, output_dir, config.resume))
    for number, folder in enumerate(folders, start=1):
        try:
            record = from_main(partial(checkpoint_folder.read_record, folder))
            on_every_rank(partial(_check_share, folder, record["files"], distributed))
        except UserError as error:
            if number == len(folders):
                raise
            print_rank_0(f"{error}; trying {folders[number].name}")
            continue
        plan.check_continues(
            str(folder), record, distributed.world_size, config.resume_with_new_rates
        )
        return Checkpoint(folder, record)
    return None


def _check_share(folder: Path, digests: Mapping[str, str], distributed: Distributed) -> None:
    """Check the files whose bytes this rank reads: one in so many as there are ranks."""
    names = sorted(digests)[distributed.rank :: distributed.world_size]
    checkpoint_folder.check_files(folder, {name: digests[name] for name in names})
