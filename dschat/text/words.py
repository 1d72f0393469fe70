"""Words of many texts at once, and the token ids of words, in arrays rather than lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise, repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Words:
    """The words of some texts, without the spaces in front of them.

    A text is cut at each space that follows no white space. Arrow cuts, and numbers the words:
    far fewer than there are in the texts are left for Python.
    """

    names: list[str]  # each word once
    of_text: np.ndarray  # (words of all texts,) int; places in `names`
    first: np.ndarray  # (texts,) int; where each text begins in `of_text`

    @classmethod
    def of(cls, texts: list[str]) -> Words:
        """Cut texts, at least one."""
        rows = pc.split_pattern(pa.array(texts, pa.large_string()), " ")
        begins = rows.offsets.to_numpy()[:-1]
        parts = rows.flatten().dictionary_encode()
        names, codes = parts.dictionary.to_pylist(), parts.indices.to_numpy()
        # After white space a space is no cut: such a part and the next are one word.
        ends = pc.utf8_slice_codeunits(parts.dictionary, -1).dictionary_encode()
        spaces = [not end or end.isspace() for end in ends.dictionary.to_pylist()]
        binds = np.array(spaces)[ends.indices.to_numpy()]
        starts = np.ones(len(codes), bool)
        starts[1:] = ~binds[codes[:-1]]
        starts[begins] = True
        bounds = np.append(np.flatnonzero(starts), len(codes))
        of_text = codes[bounds[:-1]].astype(np.int64)
        long = np.flatnonzero(np.diff(bounds) > 1)
        numbers: dict[tuple[int, ...], int] = {}
        spans = zip(long.tolist(), bounds[long].tolist(), bounds[long + 1].tolist(), strict=True)
        for word, start, stop in spans:
            some = tuple(codes[start:stop].tolist())
            of_text[word] = numbers.setdefault(some, len(binds) + len(numbers))
        names += [" ".join([names[code] for code in some]) for some in numbers]
        return cls(names, of_text, np.searchsorted(bounds, begins))


class PieceIds:
    """Ids of numbered pieces of text, one after the other in one array."""

    def __init__(self) -> None:
        self.numbers: dict[str | tuple[str, bool], int] = {}
        self._ids = np.empty(1 << 16, np.int32)
        self._bounds = np.zeros(1 << 14, np.int64)  # of piece n: entries n and n + 1

    def numbers_of(self, pieces: list, learn: Callable[[list], None]) -> np.ndarray:
        """Look up the numbers of pieces; `learn` adds those that have none, once each."""
        numbers = self._numbers(pieces)
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            some = [pieces[place] for place in missing.tolist()]
            learn(list(dict.fromkeys(some)))
            numbers[missing] = self._numbers(some)
        return numbers

    def _numbers(self, pieces: list) -> np.ndarray:
        """Look up the numbers of pieces; -1: it has none."""
        return np.fromiter(map(self.numbers.get, pieces, repeat(-1)), np.int64, len(pieces))

    def add(self, pieces: list, ids: list[int], stops: Iterable[int]) -> None:
        """Add new pieces, whose ids follow one another; `stops` are their ends."""
        count = len(self.numbers)
        begin, end = int(self._bounds[count]), count + len(pieces)
        self._ids = _at_least(self._ids, begin + len(ids))
        self._bounds = _at_least(self._bounds, end + 1)
        self._ids[begin : begin + len(ids)] = ids
        self._bounds[count + 1 : end + 1] = begin + np.asarray(stops)
        self.numbers.update(zip(pieces, range(count, end), strict=True))

    def joined(self, pieces: np.ndarray, first: np.ndarray) -> list[list[int]]:
        """Concatenate the ids of each text's pieces; text i starts at `pieces[first[i]]`."""
        begins = self._bounds[pieces]
        sizes = self._bounds[pieces + 1] - begins
        stops = np.cumsum(sizes)
        # Place of each id: as far after its piece's first id there as here.
        places = np.arange(stops[-1]) + np.repeat(begins - (stops - sizes), sizes)
        ids = self._ids[places].tolist()
        cuts = [*(stops - sizes)[first].tolist(), len(ids)]
        return [ids[start:stop] for start, stop in pairwise(cuts)]


def _at_least(array: np.ndarray, size: int) -> np.ndarray:
    """Give the array, or a longer one that begins with it."""
    return array if size <= len(array) else np.resize(array, max(size, 2 * len(array)))
