"""Batch samplers that count tokens: as many rows as fit, or rows packed to one length."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dschat.data.batching import BATCHES_PER_CHUNK, Epoch

# Rows that are packed together: enough to fill all but the last packs of a chunk.
_ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class TokenBudgetBatches:
    """As many rows as fit, padded to the longest, in `limit` tokens; an item is a micro-batch.

    `sequences` is how many sequences a row becomes (two for a pair).
    """

    limit: int
    sequences: int = 1

    packs: ClassVar[bool] = False

    def epoch(self, lengths: np.ndarray, world_size: int, rng: np.random.Generator) -> Epoch:
        """Deal one micro-batch to each rank; the last batch may have fewer than ranks."""
        order = rng.permutation(len(lengths))
        mean = max(1.0, float(lengths.mean()) * self.sequences)
        chunks = _chunks(order, int(max(1, self.limit // mean)) * BATCHES_PER_CHUNK)
        items = (item for chunk in chunks for item in self._fill(chunk, lengths))
        return _shuffled(items, world_size, rng)

    def count(self, num_rows: int, world_size: int) -> None:
        """Lengths decide."""
        return None

    def _fill(self, chunk: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        items: list[list[int]] = [[]]
        for row in chunk[np.argsort(lengths[chunk], kind="stable")].tolist():
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

    packs: ClassVar[bool] = True

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
    # The row at place p of the new order, in item i, stood at p + old_starts[order[i]] -
    # new_starts[i]; `shifts` holds what is added to p, for every place.
    shifts = np.repeat(old_starts[order] - new_starts[:-1], new_sizes)
    return Epoch(np.array(rows)[np.arange(len(rows)) + shifts], new_starts, size)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
