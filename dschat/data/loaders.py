"""Batches to ranks: every row once an epoch, in a new order each epoch, on any number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np

from dschat.data.batching import ByRows, Epoch, Grouping
from dschat.data.collators import PackedCollator, Row
from dschat.data.stream import RowStream, StreamLoader


class Loader:
    """Batches of one rank: the same number on every rank, each row of the set once an epoch.

    A rank left without rows by the last global batch gets a single filler row, `real` False.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        collator: Callable[[Sequence[Any]], Any],
        grouping: Grouping,
        *,
        rank: int,
        world_size: int,
        seed: int | None,
    ) -> None:
        """`seed` None: always in the order of lengths, which takes a grouping by rows."""
        self._dataset, self._collator, self._grouping = dataset, collator, grouping
        self._lengths = np.asarray(dataset.with_format("numpy")["length"][:])
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._epoch = self._skip = 0
        self._drawn: tuple[int, Epoch] | None = None

    def __len__(self) -> int:
        """Batches of the present epoch, the same on every rank."""
        return self.batches_in(self._epoch)

    def batches_in(self, epoch: int) -> int:
        """Batches of an epoch; with packing or batches by tokens epochs differ a little."""
        count = self._grouping.count(len(self._lengths), self._world_size)
        return len(self._draw(epoch)) if count is None else count

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Draw the order of this epoch from (seed, epoch); no effect without shuffling.

        Its first `skip` batches, which a resumed run has had, are left out and never read.
        """
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[Any]:
        epoch = self._draw(self._epoch)
        for number in range(self._skip, len(epoch)):
            units = epoch.batch(number)
            mine = units[self._rank :: self._world_size]
            yield self._collate(mine, True) if mine else self._collate([units[0][:1]], False)

    def _collate(self, units: Sequence[Sequence[int]], real: bool) -> Any:
        rows = iter(self._read(list(chain.from_iterable(units)), real))
        packs = [[next(rows) for _ in unit] for unit in units]
        is_packed = isinstance(self._collator, PackedCollator)
        return self._collator(packs if is_packed else list(chain.from_iterable(packs)))

    def _read(self, numbers: list[int], real: bool) -> list[Row]:
        """Rows of one batch, read in one go."""
        columns = self._dataset[numbers]
        return [
            {**dict(zip(columns, values, strict=True)), "real": real}
            for values in zip(*columns.values(), strict=True)
        ]

    def _draw(self, number: int) -> Epoch:
        if self._seed is None:
            number = 0
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, self._drawn_anew(number)
        return self._drawn[1]

    def _drawn_anew(self, number: int) -> Epoch:
        if self._seed is None:
            return self._grouping.sorted_epoch(self._lengths, self._world_size)
        rng = np.random.default_rng([self._seed, number])
        return self._grouping.epoch(self._lengths, self._world_size, rng)


def build_loader(
    dataset: datasets.Dataset | RowStream,
    collator: Callable[[Sequence[Any]], Any],
    batch_size: int | Grouping,
    *,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool,
) -> Loader | StreamLoader:
    """A loader of this rank's batches of at most `batch_size` rows, or of another grouping's.

    The units of a global batch (rows; packs; whole micro-batches by tokens) are dealt among the
    ranks, so the same rows meet in it for any split into ranks. Without `shuffle`, rows come by
    length.

    Raises:
        ValueError: no rows, or sizes that make no sense.
    """
    grouping = ByRows(batch_size) if isinstance(batch_size, int) else batch_size
    by_rows = isinstance(grouping, ByRows)
    if isinstance(dataset, RowStream):
        if not (by_rows and shuffle):
            raise ValueError("streamed rows are shuffled, and batched by rows")
        return StreamLoader(dataset, collator, grouping.size, rank, world_size, seed)
    if (by_rows and grouping.size < 1) or not len(dataset) or not 0 <= rank < world_size:
        raise ValueError(f"{len(dataset)} rows, batch size {batch_size}, rank {rank}/{world_size}")
    if not (by_rows or shuffle):
        raise ValueError("rows that come by length are batched by rows")
    return Loader(
        dataset,
        collator,
        grouping,
        rank=rank,
        world_size=world_size,
        seed=seed if shuffle else None,
    )
