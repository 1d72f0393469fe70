"""Rows tokenised as they are read, for sets larger than the disk: nothing of them is kept.

Every rank reads all rows in blocks, and tokenises its own share of each. A block is shuffled, so
each epoch has a new order as far as blocks reach; each row is trained on once an epoch, whatever
the number of ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import datasets
import numpy as np

from dschat.data.config import parse_proportions
from dschat.data.report import SourceReport
from dschat.data.sources import Finder
from dschat.data.store import read_examples
from dschat.data.tokenise import FEATURES, NEEDED, Converter
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.text.conversations import Example

BATCHES_PER_BLOCK = 50
# For evaluation, unless max_eval_samples says otherwise: they are in memory.
_STREAMED_EVAL_ROWS = 1_000
_SPLIT_STREAM = 3  # of the seed, apart from those of `splits`
_ROWS_PER_DRAW = 4096

_DROPPED = ("identical_pairs", "empty_answers")
_CUT = ("prompts_cut", "answers_cut", "turns_cut", *_DROPPED, "special_names")

# The row of a rank that has none; it counts nowhere. Each collator takes its own columns.
_FILLER = {
    **{"input_ids": [0, 0], "trained": [1, 2], "chosen_ids": [0, 0], "rejected_ids": [0, 0]},
    **{"prompt_ids": [0], "prompt_len": 1, "length": 2, "real": False},
}


@dataclass(frozen=True)
class RowStream:
    """Examples that can be read again and again, and the converter of a batch of them."""

    read: Callable[[], Iterator[Example]]
    convert: Converter  # counts rows truncated and dropped
    skipped: Counter[str] = field(default_factory=Counter)  # unusable rows, of all readings


def stream_sources(
    sources: Sequence[tuple[str, str]],
    options: ReadOptions,
    convert: Converter,
    seed: int,
    eval_rows: int | None,
) -> tuple[RowStream, datasets.Dataset, SourceReport]:
    """Open the train rows of a phase as a stream, and tokenise the first test rows.

    Args:
        sources: their names, each with the proportions of its split.
        eval_rows: how many test rows at most; None: 1,000.

    Raises:
        UserError: a source without test rows, or no rows in any.
    """
    phase, trained, tested = convert.phase, [], []
    skipped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, split in sources:
        train, test = Finder(streaming=True).find(name)
        if test is None:
            raise UserError(
                f"streaming: {name} has no test rows, and none can be held out of a stream; "
                "put a test file beside the train file, or drop streaming"
            )
        trained.append((train, name, parse_proportions(split)))
        tested.append(read_examples(test, name, options, skipped))

    def read() -> Iterator[Example]:
        parts = [
            rows_of_phase(read_examples(rows, name, options, skipped), seed, share, phase)
            for rows, name, share in trained
        ]
        return complete(in_turns(parts), phase)

    limit = eval_rows or _STREAMED_EVAL_ROWS
    rows = list(complete(islice(in_turns(tested), limit), phase))
    if not rows:
        raise UserError("streaming: the test files hold no rows; give at least one")
    evaluation = datasets.Dataset.from_dict(convert(rows, counts), FEATURES[phase])
    names = ", ".join(name for name, _ in sources)
    about: dict[str, Any] = {"skipped": dict(skipped), **counts}
    report = SourceReport(names, "eval", len(rows), len(evaluation), **about)
    return RowStream(read, convert, skipped), evaluation, report


def in_turns(sources: Sequence[Iterator[Example]]) -> Iterator[Example]:
    """Take a row of each source in turn, until all have ended."""
    waiting = list(sources)
    while waiting:
        for rows in tuple(waiting):
            row = next(rows, None)
            if row is None:
                waiting.remove(rows)
            else:
                yield row


def complete(rows: Iterator[Example], phase: int) -> Iterator[Example]:
    """Pass rows on; UserError at the first that lacks a column."""
    for row in rows:
        for column in NEEDED[phase]:
            if getattr(row, column) is None:
                raise UserError(
                    f"{row.place} has no {column!r}, which phase {phase} needs; "
                    "add the column or use another source"
                )
        yield row


def rows_of_phase(
    rows: Iterator[Example], seed: int, proportions: Sequence[float], phase: int
) -> Iterator[Example]:
    """Pass the rows of a phase on; a row's place in its source decides, so phases never mix.

    The size being unknown, each row is drawn by itself: sizes are near the proportions.
    """
    if len(proportions) == 1:
        yield from rows
        return
    bounds = np.cumsum(proportions) / sum(proportions)
    for number in count():
        part = list(islice(rows, _ROWS_PER_DRAW))
        if not part:
            return
        draws = np.random.default_rng([seed, _SPLIT_STREAM, number]).random(_ROWS_PER_DRAW)
        phases = np.searchsorted(bounds, draws, side="right") + 1
        yield from (row for row, drawn in zip(part, phases, strict=False) if drawn == phase)


@dataclass
class StreamLoader:
    """Batches of one rank, as many on every rank; how many there are shows when they end."""

    stream: RowStream
    collator: Callable[[Sequence[dict[str, Any]]], Any]
    batch_size: int
    rank: int
    world_size: int
    seed: int
    counts: Counter[str] = field(default_factory=Counter)  # of this rank's rows, all epochs
    _reported_skipped: int = 0

    def batches_in(self, epoch: int) -> None:
        """Return None: nobody has counted the rows."""
        return None

    def __iter__(self) -> Iterator[Any]:
        return self.batches(0)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch, in an order drawn from (seed, epoch)."""
        if skip:
            raise ValueError("a stream cannot go on in the middle of an epoch")
        size = self.batch_size * self.world_size
        rows, number = self.stream.read(), 0
        while block := list(islice(rows, size * BATCHES_PER_BLOCK)):
            rng = np.random.default_rng([self.seed, epoch, number])
            order = rng.permutation(len(block))
            mine = [block[at] for at in order[self.rank :: self.world_size]]
            yield from self._batches(mine, -(-len(block) // size), rng)
            number += 1
        if not number:
            raise UserError("streaming: the data holds no rows for this phase; check data_split")

    def _batches(
        self, block: list[Example], batches: int, rng: np.random.Generator
    ) -> Iterator[Any]:
        """Divide this rank's rows into batches, like lengths together; without rows, of filler."""
        rows = self._tokens(block)
        rows.sort(key=lambda row: row["length"])
        parts = np.array_split(np.arange(len(rows)), batches)
        for part in (parts[at] for at in rng.permutation(batches)):
            yield self.collator([{**rows[at], "real": True} for at in part] or [_FILLER])

    def _tokens(self, block: list[Example]) -> list[dict[str, Any]]:
        if not block:
            return []
        before = self.counts.copy()
        columns = self.stream.convert(block, self.counts)
        rows = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        self.counts.update(rows=len(block), used=len(rows))
        skipped = self.stream.skipped.total()
        dropped = any((self.counts - before)[name] for name in _DROPPED)
        if self.rank == 0 and (dropped or skipped > self._reported_skipped):
            counts = _described(self.counts, self.stream.skipped)
            print(f"streaming, so far on rank 0: {counts}", flush=True)
        self._reported_skipped = skipped
        return rows


def _described(counts: Counter[str], skipped: Counter[str]) -> str:
    named = [(counts[name], name.replace("_", " ")) for name in ("rows", "used", *_CUT)]
    named += [(number, f"skipped ({reason})") for reason, number in skipped.items()]
    return ", ".join(f"{number} {name}" for number, name in named if number)
