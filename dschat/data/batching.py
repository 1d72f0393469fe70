"""Rows to batches: so many rows, so many tokens, or rows packed to one length make a batch.

A sampler draws the items of an epoch, and a loader deals them to ranks. An item is a row, a
micro-batch or a pack, and holds the same rows however many ranks there are: each row is trained on
once an epoch, in a new order each epoch, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    import datasets

    from dschat.data.stream import RowStream, StreamLoader

# Rows of like length are sought within this many batches: enough to save most padding, few enough
# that which rows meet in a batch still differs from epoch to epoch.
BATCHES_PER_CHUNK = 50


@dataclass(frozen=True)
class Epoch:
    """The items of an epoch in their order, flat: a few bytes a row, however many there are."""

    rows: np.ndarray  # (N,) every row once
    starts: np.ndarray  # (I + 1,) item i holds rows[starts[i] : starts[i + 1]]
    size: int  # items of a global batch; the last may have fewer

    def __len__(self) -> int:
        """Count global batches."""
        return -(-(len(self.starts) - 1) // self.size)

    def batches(self, skip: int = 0) -> Iterator[list[list[int]]]:
        """Yield the items of each global batch; rank r of n takes items r, r + n, ..."""
        for first in range(skip * self.size, len(self.starts) - 1, self.size):
            bounds = self.starts[first : first + self.size + 1].tolist()
            yield [self.rows[start:stop].tolist() for start, stop in pairwise(bounds)]


class BatchSampler(Protocol):
    """Turns the rows of an epoch into global batches.

    Attributes:
        packs: an item is several rows that the collator joins into one.
    """

    packs: ClassVar[bool]

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Draw one epoch over rows of these lengths."""
        ...

    def count(self, num_rows: int, world_size: int) -> int | None:
        """Count the batches of an epoch where the number of rows decides it, else None."""
        ...


@dataclass(frozen=True)
class RowBatches:
    """At most `size` rows a rank and batch, rows of like length together; an item is a row."""

    size: int

    packs: ClassVar[bool] = False

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Shuffle the batches; the last one holds the remaining rows."""
        size = self.size * world_size
        order = rng.permutation(len(lengths))
        # The rows of the short last batch leave before the sorting, or they would be the longest.
        full, rest = np.split(order, [len(order) // size * size])
        for start in range(0, len(full), size * BATCHES_PER_CHUNK):
            chunk = full[start : start + size * BATCHES_PER_CHUNK]
            chunk[:] = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = full.reshape(-1, size)
        rows = np.concatenate([batches[rng.permutation(len(batches))].ravel(), rest])
        return Epoch(rows, np.arange(len(rows) + 1), size)

    def count(self, num_rows: int, world_size: int) -> int:
        """Divide rows by rows a batch, rounded up."""
        return -(-num_rows // (self.size * world_size))


@dataclass(frozen=True)
class SortedBatches(RowBatches):
    """The same from the shortest rows to the longest in every epoch, for evaluation."""

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Sort all rows by length; nothing is drawn."""
        rows = np.argsort(lengths, kind="stable")
        return Epoch(rows, np.arange(len(rows) + 1), self.size * world_size)


@dataclass
class Loader:
    """Batches of one rank: the same number on every rank, each row of the set once an epoch.

    Beside its columns a row has `number`, its place in the set, and `real`: a rank left without
    rows by the last global batch gets a single filler row, for which it is False.
    """

    dataset: datasets.Dataset
    lengths: np.ndarray  # (N,) tokens of its rows
    collator: Callable[[Sequence[Any]], Any]
    sampler: BatchSampler
    rank: int
    world_size: int
    seed: int
    _last_draw: tuple[int, Epoch] | None = None

    @property
    def rows(self) -> int:
        """Count the rows of the set."""
        return len(self.lengths)

    def batches_in(self, epoch: int) -> int:
        """Count a rank's batches of an epoch; packed or by tokens, epochs differ a little."""
        count = self.sampler.count(len(self.lengths), self.world_size)
        return len(self._draw(epoch)) if count is None else count

    def __iter__(self) -> Iterator[Any]:
        return self.batches(0)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch, in an order drawn from (seed, epoch) where rows shuffle.

        Its first `skip` batches, which a resumed run has had, are left out and never read.
        """
        for items in self._draw(epoch).batches(skip):
            mine = items[self.rank :: self.world_size]
            is_real = bool(mine)
            if not is_real:
                mine = [items[0][:1]]
            numbers = list(chain.from_iterable(mine))
            columns = self.dataset[numbers]  # read in one go
            rows: Iterator[Any] = (
                {**dict(zip(columns, values, strict=True)), "real": is_real, "number": number}
                for number, *values in zip(numbers, *columns.values(), strict=True)
            )
            if self.sampler.packs:
                yield self.collator([[next(rows) for _ in pack] for pack in mine])
            else:
                yield self.collator(list(rows))

    def _draw(self, number: int) -> Epoch:
        if self._last_draw is None or self._last_draw[0] != number:
            rng = np.random.default_rng([self.seed, number])
            epoch = self.sampler.epoch(self.lengths, self.world_size, rng)
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
    from dschat.data.stream import RowStream, StreamLoader

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
    lengths = np.asarray(dataset.with_format("numpy")["length"][:])
    return Loader(dataset, lengths, collator, sampler, rank, world_size, seed)
