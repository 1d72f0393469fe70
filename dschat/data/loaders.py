"""Batches to ranks: every row once an epoch, in a new order each epoch, on any number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np

from dschat.data.batching import BatchSampler, Epoch, RowBatches, SortedBatches
from dschat.data.collators import PackedCollator
from dschat.data.stream import RowStream, StreamLoader


class Loader:
    """Batches of one rank: the same number on every rank, each row of the set once an epoch.

    A rank left without rows by the last global batch gets a single filler row, `real` False.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        collator: Callable[[Sequence[Any]], Any],
        sampler: BatchSampler,
        *,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self._dataset, self._collator, self._sampler = dataset, collator, sampler
        self._lengths = np.asarray(dataset.with_format("numpy")["length"][:])
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._epoch = self._skip = 0
        self._last_draw: tuple[int, Epoch] | None = None

    def __len__(self) -> int:
        """Count the batches of the present epoch, the same on every rank."""
        return self.batches_in(self._epoch)

    def batches_in(self, epoch: int) -> int:
        """Count the batches of an epoch; packed or by tokens, epochs differ a little."""
        count = self._sampler.count(len(self._lengths), self._world_size)
        return len(self._draw(epoch)) if count is None else count

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Draw the order of this epoch from (seed, epoch); no effect without shuffling.

        Its first `skip` batches, which a resumed run has had, are left out and never read.
        """
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[Any]:
        epoch = self._draw(self._epoch)
        for number in range(self._skip, len(epoch)):
            items = epoch.batch(number)
            mine = items[self._rank :: self._world_size]
            yield self._batch(mine, True) if mine else self._batch([items[0][:1]], False)

    def _batch(self, items: Sequence[Sequence[int]], real: bool) -> Any:
        columns = self._dataset[list(chain.from_iterable(items))]  # read in one go
        rows = [
            {**dict(zip(columns, values, strict=True)), "real": real}
            for values in zip(*columns.values(), strict=True)
        ]
        if not isinstance(self._collator, PackedCollator):
            return self._collator(rows)
        of_packs = iter(rows)
        return self._collator([[next(of_packs) for _ in item] for item in items])

    def _draw(self, number: int) -> Epoch:
        if self._last_draw is None or self._last_draw[0] != number:
            rng = np.random.default_rng([self._seed, number])
            epoch = self._sampler.epoch(self._lengths, self._world_size, rng)
            self._last_draw = number, epoch
        return self._last_draw[1]


def build_loader(
    dataset: datasets.Dataset | RowStream,
    collator: Callable[[Sequence[Any]], Any],
    batch_size: int | BatchSampler,
    *,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool,
) -> Loader | StreamLoader:
    """Build a loader of this rank's batches of at most `batch_size` rows, or of a sampler's.

    The items of a global batch (rows; packs; micro-batches by tokens) are dealt among the ranks,
    so the same rows meet in it for any split into ranks. Without `shuffle`, rows come by length.

    Raises:
        ValueError: no rows, no such rank, or a combination that makes no sense.
    """
    sampler = RowBatches(batch_size) if isinstance(batch_size, int) else batch_size
    if isinstance(dataset, RowStream):
        if not (isinstance(sampler, RowBatches) and shuffle):
            raise ValueError("streamed rows are shuffled, and batched by rows")
        return StreamLoader(dataset, collator, sampler.size, rank, world_size, seed)
    is_empty = isinstance(sampler, RowBatches) and sampler.size < 1
    if is_empty or not len(dataset) or not 0 <= rank < world_size:
        raise ValueError(f"{len(dataset)} rows, batch size {batch_size}, rank {rank}/{world_size}")
    if not shuffle:
        if not isinstance(sampler, RowBatches):
            raise ValueError("rows that come by length are batched by rows")
        sampler = SortedBatches(sampler.size)
    return Loader(dataset, collator, sampler, rank=rank, world_size=world_size, seed=seed)
