"""Rows to batches: so many rows, so many tokens, or rows packed to one length make a batch.

A sampler draws the items of an epoch, and a loader deals them to ranks. An item is a row, a
micro-batch or a pack, and holds the same rows however many ranks there are: each row is trained on
once an epoch, in a new order each epoch, on any number of ranks.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import datasets
import numpy as np

from dschat.data.stream import RowStream, StreamLoader

# Rows of like length are sought within this many batches: enough to save most padding, few enough
# that which rows meet in a batch still differs from epoch to epoch.
_BATCHES_PER_CHUNK = 50
# Rows that are packed together: enough to fill all but the last packs of a chunk.
_ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Epoch:
    """The items of an epoch in their order, flat: a few bytes a row, however many there are."""

    rows: np.ndarray  # (N,) every row once
    starts: np.ndarray  # (I + 1,) item i holds rows[starts[i] : starts[i + 1]]
    size: int  # items of a global batch; the last may have fewer

    def __len__(self) -> int:
        """Count global batches."""
        return -(-(len(self.starts) - 1) // self.size)

    def batch(self, number: int) -> list[list[int]]:
        """Give the items of one global batch; rank r of n takes items r, r + n, ..."""
        bounds = self.starts[number * self.size : (number + 1) * self.size + 1].tolist()
        return [self.rows[start:stop].tolist() for start, stop in pairwise(bounds)]


class BatchSampler(Protocol):
    """Turns the rows of an epoch into global batches."""

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

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Shuffle the batches; the last one holds the remaining rows."""
        size = self.size * world_size
        order = rng.permutation(len(lengths))
        # The rows of the short last batch leave before the sorting, lest they be the longest.
        full, rest = np.split(order, [len(order) // size * size])
        for start in range(0, len(full), size * _BATCHES_PER_CHUNK):
            chunk = full[start : start + size * _BATCHES_PER_CHUNK]
            chunk[:] = _by_length(chunk, lengths)
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
        rows = _by_length(np.arange(len(lengths)), lengths)
        return Epoch(rows, np.arange(len(rows) + 1), self.size * world_size)


@dataclass(frozen=True)
class TokenBudgetBatches:
    """As many rows as fit, padded to the longest, in `limit` tokens; an item is a micro-batch.

    `sequences` is how many sequences a row becomes (two for a pair).
    """

    limit: int
    sequences: int = 1

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Deal one micro-batch to each rank; the last batch may have fewer than ranks."""
        order = rng.permutation(len(lengths))
        mean = max(1.0, float(lengths.mean()) * self.sequences)
        chunks = _chunks(order, int(max(1, self.limit // mean)) * _BATCHES_PER_CHUNK)
        items = (item for chunk in chunks for item in self._fill(chunk, lengths))
        return _shuffled(items, world_size, rng)

    def count(self, num_rows: int, world_size: int) -> None:
        """Lengths decide."""
        return None

    def _fill(self, chunk: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        items: list[list[int]] = [[]]
        for row in _by_length(chunk, lengths).tolist():
            # Sorted: the newcomer is the longest, all are padded to it.
            if (len(items[-1]) + 1) * self.sequences * int(lengths[row]) > self.limit:
                items.append([])
            items[-1].append(row)
        return [item for item in items if item]


@dataclass(frozen=True)
class PackedBatches:
    """`size` packs a rank and batch; an item is a pack: rows of up to `capacity` tokens in all."""

    size: int
    capacity: int

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Shuffle the packs; the last batch holds the remaining ones."""
        order = rng.permutation(len(lengths))
        items = (
            chunk[pack].tolist()
            for chunk in _chunks(order, _ROWS_PER_CHUNK)
            for pack in best_fit_decreasing(lengths[chunk].tolist(), self.capacity)
        )
        return _shuffled(items, self.size * world_size, rng)

    def count(self, num_rows: int, world_size: int) -> None:
        """Lengths decide."""
        return None


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide rows into packs of at most `capacity` tokens each.

    Rows go from the longest to the shortest, each into the pack that it leaves the least room in
    (Johnson 1973); those of one length in their given order. Packs are looked up by their room, so
    finding one takes at most `capacity` steps, however many there are.

    Raises:
        ValueError: a row longer than a pack.
    """
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # numbers of packs, by room
    # Bit r of this integer is set where some pack has room r. Shifted right by a row's length, its
    # lowest set bit is the least room that the row fits into: one operation on machine words.
    rooms = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[row]
        if length > capacity:
            raise ValueError(f"row of {length} tokens does not fit into {capacity}")
        fitting = rooms >> length
        if fitting:
            lowest_bit = fitting & -fitting
            room = length + lowest_bit.bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


def _by_length(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(lengths[rows], kind="stable")]


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide rows into parts of like size, none larger than `size`."""
    return np.array_split(order, -(-len(order) // size))


def _shuffled(items: Iterable[list[int]], size: int, rng: np.random.Generator) -> Epoch:
    """Put items into a new order, flat: millions of small lists would take far more memory."""
    rows, sizes = array("q"), array("q")
    for item in items:
        rows.extend(item)
        sizes.append(len(item))
    order = rng.permutation(len(sizes))
    old_starts, new_sizes = _starts(np.array(sizes)), np.array(sizes)[order]
    new_starts = _starts(new_sizes)
    # The row at place p of the new order, in item i, stood at old_starts[order[i]] + (p -
    # new_starts[i]); the second line is that for all places at once.
    shifts = np.repeat(old_starts[order] - new_starts[:-1], new_sizes)
    return Epoch(np.array(rows)[np.arange(len(rows)) + shifts], new_starts, size)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


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
        if not isinstance(self._sampler, PackedBatches):
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
