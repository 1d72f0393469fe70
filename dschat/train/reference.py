"""The policy that training starts from, as a preference loss compares with it.

No second model stands on the device: it is the model with its adapters off, or log-probabilities
that were computed before training and are kept beside the tokenised rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dschat.data.batches import PreferenceBatch
from dschat.data.batching import Loader
from dschat.data.cache import damage_of, written_once
from dschat.data.sources import digest
from dschat.errors import UserError
from dschat.models.causal_lm import eval_mode, unwrap
from dschat.train.checksums import base_checksum
from dschat.train.pair_logprobs import mismatched_logprobs, pair_logprobs
from dschat.train.progress import timed
from dschat.utils.distributed import (
    Distributed,
    all_gather,
    all_reduce_max,
    print_rank_0,
)
from dschat.utils.module.lora import adapters_disabled
from dschat.utils.waiting import from_local_main

VERSION = 1  # part of every key: raise it when the same model is to be scored differently
KIND, FILE, NAME = "references", "logprobs.safetensors", "logprobs"  # in the cache of the data


class Reference:
    """Gives log-probabilities of a batch's answers under the reference; here there is none.

    Attributes:
        key: digest of what they depend on, where they were computed beforehand.
    """

    per_rank = False  # its state

    def __init__(self, key: str = "") -> None:
        self.key = key

    def pairs(
        self, model: nn.Module, batch: PreferenceBatch
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B,) of the chosen and (B,) of the rejected answers; None without a reference."""
        return None

    def mismatched(self, model: nn.Module, batch: PreferenceBatch) -> torch.Tensor:
        """(B,) of the answers to other prompts."""
        raise NotImplementedError("no loss without a reference asks for it")

    def state_dict(self) -> dict[str, str]:
        """State: the key."""
        return {"key": self.key}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Check that the run compares with what it began with.

        Raises:
            UserError: another model, dtype or rows.
        """
        if state["key"] != self.key:
            raise UserError(
                "resume: the reference's log-probabilities are those of another model than the "
                "one that the run began with; give the same model folder"
            )


class AdaptersOff(Reference):
    """Scores with the trained model, its adapters off: a forward pass of each batch."""

    @torch.no_grad()
    def pairs(self, model: nn.Module, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base scores them."""
        with as_base(model):
            return pair_logprobs(model, batch)

    @torch.no_grad()
    def mismatched(self, model: nn.Module, batch: PreferenceBatch) -> torch.Tensor:
        """As the base scores them."""
        with as_base(model):
            return mismatched_logprobs(model, batch)


@contextlib.contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Compute what training started from inside the block, without dropout."""
    with eval_mode(model), adapters_disabled(unwrap(model)):
        yield


class Precomputed(Reference):
    """Looks log-probabilities up by the numbers of the rows.

    Args:
        table: (N, 2) fp64 of chosen and rejected answers, or (N, 3) with those to other prompts.
        key: digest of the model, its dtype and the rows.
    """

    def __init__(self, table: torch.Tensor, key: str) -> None:
        super().__init__(key)
        self.table = table

    def pairs(self, model: nn.Module, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As they were computed."""
        chosen, rejected, *_ = self.table[batch.numbers].unbind(-1)
        return chosen, rejected

    def mismatched(self, model: nn.Module, batch: PreferenceBatch) -> torch.Tensor:
        """As they were computed."""
        return self.table[batch.numbers, 2]


def precompute(
    engine: nn.Module,
    loaders: Sequence[Loader],
    distributed: Distributed,
    data: tuple[Path, str],
    columns: int,
) -> Precomputed:
    """Read the reference's log-probabilities of all rows, computed first unless they are kept.

    Every rank scores its share, before the first optimizer step. Damaged scores are computed again.

    Args:
        loaders: of training and evaluation rows; each gives every row once.
        data: folder of cached data, and the key of the rows.
        columns: 2, or 3 with answers to other prompts.

    Raises:
        UserError: a log-probability is not finite, or the folder cannot be written.
    """
    root, rows_key = data
    sizes = [loader.rows for loader in loaders]
    parts = [str(VERSION), base_checksum(unwrap(engine)), rows_key, str(unwrap(engine).dtype)]
    key = digest(*parts, json.dumps([*sizes, columns]))
    kept = _read(root / KIND / key)
    (missing,) = all_reduce_max([float(kept is None)])
    if kept is not None and not missing:
        print_rank_0(f"reference: log-probabilities of {sum(sizes)} pairs, read from {root}")
        return Precomputed(kept.to(distributed.device), key)
    table, seconds = timed(_compute, engine, loaders, distributed.device, columns)
    from_local_main(partial(_write, root, key, table))
    print_rank_0(
        f"reference: log-probabilities of {sum(sizes)} pairs, computed once in {seconds:.1f} s and "
        f"kept in {root}"
    )
    return Precomputed(table.to(distributed.device), key)


@torch.no_grad()
def _compute(
    engine: nn.Module, loaders: Sequence[Loader], device: torch.device, columns: int
) -> torch.Tensor:
    """Score every row once, shared among the ranks: (N, columns) on the CPU."""
    numbers, values = [], []
    with as_base(engine):
        for loader in loaders:
            for batch in loader:
                batch = batch.to(device)
                found = [*pair_logprobs(engine, batch)]
                if columns == 3:
                    found.append(mismatched_logprobs(engine, batch))
                numbers.append(batch.numbers[batch.real].cpu())
                values.append(torch.stack(found, dim=-1)[batch.real].cpu())
    size = sum(loader.rows for loader in loaders)
    table = torch.full((size, columns), torch.nan, dtype=torch.float64)
    for places, rows in all_gather((torch.cat(numbers), torch.cat(values))):
        table[places] = rows
    if not torch.isfinite(table).all():
        row = int((~torch.isfinite(table)).any(-1).nonzero()[0])
        raise UserError(
            f"reference: the log-probability of pair {row} is not finite; look for weights that "
            "are not, or give another dtype"
        )
    return table


def _write(root: Path, key: str, table: torch.Tensor) -> str:
    """Keep a table under its key."""

    def write(folder: Path) -> None:
        save_file({NAME: table}, folder / FILE)

    return str(written_once(root, KIND, key, write))


def _read(folder: Path) -> torch.Tensor | None:
    """Read a table; None where there is none, or where it is not what was written."""
    if not folder.is_dir() or damage_of(folder) is not None:
        return None
    return load_file(folder / FILE)[NAME]
