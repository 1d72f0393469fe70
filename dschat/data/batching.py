"""Which rows meet in a batch: so many rows, so many tokens, or rows packed to one length.

A grouping draws the units of one epoch from a generator: single rows, whole micro-batches, packs.
What a unit holds does not depend on the number of ranks that the units are dealt among.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

# Rows of like length are sought within this many batches: enough to save most padding, few enough
# that which rows meet in a batch still differs from epoch to epoch.
_BATCHES_PER_CHUNK = 50
# Rows that are packed together: enough to fill all but the last packs of a chunk.
_ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class Epoch:
    """The units of an epoch in their order, flat: a few bytes a row, however many there are."""

    rows: np.ndarray  # (N,) every row once
    starts: np.ndarray  # (U + 1,) unit u holds rows[starts[u] : starts[u + 1]]
    size: int  # units of a global batch; the last may have fewer

    def __len__(self) -> int:
        """Global batches."""
        return -(-(len(self.starts) - 1) // self.size)

    def batch(self, number: int) -> list[list[int]]:
        """The units of one global batch; rank r of n takes units r, r + n, ..."""
        bounds = self.starts[number * self.size : (number + 1) * self.size + 1].tolist()
        return [self.rows[start:stop].tolist() for start, stop in pairwise(bounds)]


class Grouping(Protocol):
    """How the rows of an epoch become global batches."""

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Draw one epoch over rows of these lengths."""

    def count(self, num_rows: int, world_size: int) -> int | None:
        """Batches an epoch where the number of rows decides it, else None."""


@dataclass(frozen=True)
class ByRows:
    """At most `size` rows a rank and batch, rows of like length together; a unit is a row."""

    size: int

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Shuffled batches; the last one holds what is left."""
        size = self.size * world_size
        order = rng.permutation(len(lengths))
        # The rows of the short last batch leave before the sorting, lest they be the longest.
        whole, rest = np.split(order, [len(order) // size * size])
        for at in range(0, len(whole), size * _BATCHES_PER_CHUNK):
            chunk = whole[at : at + size * _BATCHES_PER_CHUNK]
            chunk[:] = _by_length(chunk, lengths)
        batches = whole.reshape(-1, size)
        rows = np.concatenate([batches[rng.permutation(len(batches))].ravel(), rest])
        return Epoch(rows, np.arange(len(rows) + 1), size)

    def count(self, num_rows: int, world_size: int) -> int:
        """Rows over rows a batch, rounded up."""
        return -(-num_rows // (self.size * world_size))

    def sorted_epoch(self, lengths: np.ndarray, world_size: int) -> Epoch:
        """From the shortest rows to the longest, the same every time."""
        rows = _by_length(np.arange(len(lengths)), lengths)
        return Epoch(rows, np.arange(len(rows) + 1), self.size * world_size)


@dataclass(frozen=True)
class ByTokens:
    """As many rows as fit, padded to their longest, in `limit` tokens; a unit is a micro-batch.

    `sequences` is how many sequences a row becomes (two for a pair).
    """

    limit: int
    sequences: int = 1

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """One micro-batch a rank; the last batch may have fewer than ranks."""
        order = rng.permutation(len(lengths))
        mean = max(1.0, float(lengths.mean()) * self.sequences)
        chunks = _chunks(order, int(max(1, self.limit // mean)) * _BATCHES_PER_CHUNK)
        units = (unit for chunk in chunks for unit in self._fill(chunk, lengths))
        return _shuffled(units, world_size, rng)

    def count(self, num_rows: int, world_size: int) -> None:
        """Lengths decide."""
        return None

    def _fill(self, chunk: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        units: list[list[int]] = [[]]
        for row in _by_length(chunk, lengths).tolist():
            # Sorted: the newcomer is the longest, all are padded to it.
            if (len(units[-1]) + 1) * self.sequences * int(lengths[row]) > self.limit:
                units.append([])
            units[-1].append(row)
        return [unit for unit in units if unit]


@dataclass(frozen=True)
class Packed:
    """`size` packs a rank and batch; a unit is a pack, rows of at most `capacity` tokens in all."""

    size: int
    capacity: int

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Shuffled packs; the last batch holds what is left."""
        order = rng.permutation(len(lengths))
        units = (
            chunk[pack].tolist()
            for chunk in _chunks(order, _ROWS_PER_CHUNK)
            for pack in best_fit_decreasing(lengths[chunk].tolist(), self.capacity)
        )
        return _shuffled(units, self.size * world_size, rng)

    def count(self, num_rows: int, world_size: int) -> None:
        """Lengths decide."""
        return None


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Item numbers in bins of at most `capacity` each; finding a bin does not look through them.

    Items go from the longest to the shortest, each into the bin that it leaves the least room in
    (Johnson 1973); those of one length in their given order.

    Raises:
        ValueError: an item longer than a bin.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room they have
    rooms = 0  # bit r set: some bin has room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"row of {length} tokens does not fit into {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            found = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, found = capacity, len(bins)
            bins.append([])
        bins[found].append(item)
        with_room[room - length].append(found)
        rooms |= 1 << (room - length)
    return bins


def _by_length(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(lengths[rows], kind="stable")]


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Parts of like size, none larger than `size`."""
    return np.array_split(order, -(-len(order) // size))


def _shuffled(units: Iterable[list[int]], size: int, rng: np.random.Generator) -> Epoch:
    """The units in a new order, without an object for each of them."""
    rows, sizes = array("q"), array("q")
    for unit in units:
        rows.extend(unit)
        sizes.append(len(unit))
    order = rng.permutation(len(sizes))
    starts, moved_sizes = _starts(np.array(sizes)), np.array(sizes)[order]
    moved = _starts(moved_sizes)
    shifts = np.repeat(starts[order] - moved[:-1], moved_sizes)
    return Epoch(np.array(rows)[np.arange(len(rows)) + shifts], moved, size)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
