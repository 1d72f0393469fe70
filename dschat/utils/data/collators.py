"""Rows to padded batches, and batches to ranks: every row once an epoch, like lengths together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

Row = dict[str, Any]
BatchT = TypeVar("BatchT", bound="Batch")

# Rows of like length are sought within this many global batches: enough to save most padding,
# few enough that which rows meet in a batch still differs from epoch to epoch.
_BATCHES_PER_CHUNK = 50


@dataclass(frozen=True)
class Batch:
    """What every batch has; a row whose `real` is False is filler and must count nowhere."""

    input_ids: torch.Tensor  # int64
    attention_mask: torch.Tensor  # bool, shaped like input_ids; True = not padding
    real: torch.Tensor  # (B,) bool

    def to(self: BatchT, device: torch.device | str) -> BatchT:
        """The same batch with every tensor on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Prompts with their answers, right-padded, all (B, T)."""

    loss_mask: torch.Tensor  # (B, T) bool; [b, t] True = token t is a target to be predicted


@dataclass(frozen=True)
class PairBatch(Batch):
    """Preference pairs, right-padded: rows 0..B-1 chosen, rows B..2B-1 rejected, all (2B, T)."""

    answer_mask: torch.Tensor  # (2B, T) bool; True = token of the answer, its end token included


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts to generate from, left-padded, all (B, P)."""


@dataclass(frozen=True)
class SFTCollator:
    """Phase-1 rows → SFTBatch; `train_on_prompt` makes prompt tokens targets too."""

    pad_token_id: int
    train_on_prompt: bool = False

    def __call__(self, rows: Sequence[Row]) -> SFTBatch:
        """Pad to the longest row; raises KeyError on rows of another phase."""
        input_ids, attention_mask = _pad([row["input_ids"] for row in rows], self.pad_token_id)
        real = _real(rows)
        spans = [[0, row["length"]] if self.train_on_prompt else row["trained"] for row in rows]
        loss_mask = _within(spans, attention_mask) & real[:, None]
        # The first token of a sequence has nothing before it to be predicted from.
        loss_mask[:, 0] = False
        return SFTBatch(input_ids, attention_mask, real, loss_mask)


@dataclass(frozen=True)
class PairCollator:
    """Phase-2 rows → PairBatch, both sides padded to the longest sequence of all."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> PairBatch:
        """Pad and stack chosen over rejected; raises KeyError on rows of another phase."""
        sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        input_ids, attention_mask = _pad(sequences, self.pad_token_id)
        real = _real(rows)
        starts = 2 * [row["prompt_len"] for row in rows]
        answer_mask = _from(starts, attention_mask) & real.repeat(2)[:, None]
        return PairBatch(input_ids, attention_mask, real, answer_mask)


@dataclass(frozen=True)
class PromptCollator:
    """Phase-3 rows → PromptBatch."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> PromptBatch:
        """Pad on the left; raises KeyError on rows of another phase."""
        prompts = [row["prompt_ids"] for row in rows]
        return PromptBatch(*_pad(prompts, self.pad_token_id, left=True), _real(rows))


def _pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int64) and mask (bool), both (N, longest); the mask comes from lengths alone."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = int(lengths.max())
    input_ids = torch.full((len(sequences), width), pad_token_id)  # (N, T)
    for row, ids in enumerate(sequences):
        start = width - len(ids) if left else 0
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
    columns = torch.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    return input_ids, mask


def _from(starts: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    """The part of a right-padded mask that lies at or behind each row's start, (N, T) bool."""
    columns = torch.arange(attention_mask.shape[1])
    return attention_mask & (columns >= torch.tensor(starts)[:, None])


def _within(spans: Sequence[Sequence[int]], attention_mask: torch.Tensor) -> torch.Tensor:
    """The part of a right-padded mask inside each row's [start, stop, start, stop, ...], (N, T)."""
    inside = torch.zeros_like(attention_mask)
    for row, bounds in enumerate(spans):
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
            inside[row, start:stop] = True
    return attention_mask & inside


def _real(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row.get("real", True) for row in rows])


class Loader:
    """Batches of one rank: the same number on every rank, each row of the set once an epoch."""

    def __init__(self, batches: DataLoader, sampler: "_RankBatches") -> None:
        self._batches = batches
        self._sampler = sampler

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Draw the order of this epoch from (seed, epoch); no effect without shuffling.

        Its first `skip` batches, which a resumed run has had, are left out and never read.
        """
        self._sampler.epoch, self._sampler.skip = epoch, skip


def build_loader(
    dataset: datasets.Dataset,
    collator: Callable[[Sequence[Row]], Any],
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool,
) -> Loader:
    """A loader of this rank's batches of at most `batch_size` rows.

    Each global batch of `batch_size * world_size` rows is dealt among the ranks, so the same rows
    meet in it for any split into ranks. A rank left without rows by the last one gets a single
    filler row with `real` False. Without `shuffle`, rows come by length.

    Raises:
        ValueError: no rows, or sizes that make no sense.
    """
    if not len(dataset) or batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"{len(dataset)} rows, batch size {batch_size}, rank {rank}/{world_size}")
    lengths = np.asarray(dataset.with_format("numpy")["length"][:])
    sampler = _RankBatches(lengths, batch_size, rank, world_size, seed if shuffle else None)
    batches = DataLoader(
        _Rows(dataset),
        batch_sampler=sampler,
        collate_fn=collator,
        # Its own, unused: without one, each epoch would take a draw from the global state.
        generator=torch.Generator(),
    )
    return Loader(batches, sampler)


@dataclass
class _RankBatches:
    """Batch sampler: (row, real) keys of this rank's batches; `seed` None means by length."""

    lengths: np.ndarray
    batch_size: int
    rank: int
    world_size: int
    seed: int | None
    epoch: int = 0
    skip: int = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for rows in self._global_batches()[self.skip :]:
            mine = rows[self.rank :: self.world_size]
            yield [(int(row), True) for row in mine] or [(int(rows[0]), False)]

    def _global_batches(self) -> list[np.ndarray]:
        size = self.batch_size * self.world_size
        if self.seed is None:
            order = np.argsort(self.lengths, kind="stable")
            return [order[at : at + size] for at in range(0, len(order), size)]
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        # The rows of the short last batch leave before the sorting, lest they be the longest.
        whole, rest = np.split(order, [len(order) // size * size])
        batches = []
        for at in range(0, len(whole), size * _BATCHES_PER_CHUNK):
            chunk = whole[at : at + size * _BATCHES_PER_CHUNK]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches.extend(chunk.reshape(-1, size))
        batches = [batches[at] for at in rng.permutation(len(batches))]
        return [*batches, rest] if len(rest) else batches


@dataclass(frozen=True)
class _Rows:
    """The dataset under (row, real) keys."""

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, bool]) -> Row:
        row, real = key
        return {**self.dataset[row], "real": real}
