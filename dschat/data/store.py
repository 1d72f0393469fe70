"""Rows read into one checked record, kept as memory-mapped Arrow under their content's key."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dschat.data.cache import written_once
from dschat.data.files import Rows, digest
from dschat.data.registry import Reader, ReadOptions
from dschat.errors import UserError
from dschat.text.conversations import Example, Skip

# Part of every stored file's key: raise it when the same bytes are to be read differently.
READER_VERSION = 2

# A prompt is either text, in `prompt`, or a conversation, in `turns`; the other is null. `place`
# says where a row stands ("train.jsonl line 17"), for every later message about it.
_TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("whole", pa.bool_()),
        ("place", pa.string()),
    ]
)


@dataclass(frozen=True)
class SourceReader:
    """How the rows of one source are read."""

    name: str
    options: ReadOptions

    @property
    def key(self) -> str:
        """What stored rows depend on beside their bytes."""
        return self.options.key(self.name)

    def rows(self, rows: Rows, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
        """Checked rows as they are stored; those without use are counted in `skipped`."""
        reader: Reader | None = None
        for place, row in rows.read():
            if not isinstance(row, Mapping):
                kind = type(row).__name__
                raise UserError(f"{place}: is {kind}, needs an object with the key 'prompt'")
            try:
                reader = reader or self.options.reader(self.name, row)
                example = reader(row)
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            yield _stored(example, place)


def store(rows: Rows, read: SourceReader, folder: Path) -> tuple[datasets.Dataset, dict[str, int]]:
    """Checked rows as memory-mapped Arrow, written once per content and reading; the skipped."""
    key = digest(rows.digest, rows.label, read.key, str(READER_VERSION))
    counts = folder / f"{key}.json"

    def write(part: Path) -> None:
        skipped = _write(rows, read, part)
        # First the counts, and both whole: whoever finds the rows finds them too.
        part_counts = part.with_suffix(".counts")
        part_counts.write_text(json.dumps(skipped), encoding="utf-8")
        part_counts.replace(counts)

    target = written_once(folder, f"{key}.arrow", write)
    skipped = json.loads(counts.read_text(encoding="utf-8"))
    return datasets.Dataset.from_file(str(target)), skipped


def _stored(example: Example, place: str) -> dict[str, Any]:
    """One stored row, or a UserError that names the place and the column."""
    if isinstance(example.prompt, tuple):
        turns = [{"role": turn.role, "text": turn.text} for turn in example.prompt]
        prompts = [("prompt", turn.text) for turn in example.prompt]
    else:
        turns, prompts = None, [("prompt", example.prompt)]
    answers = [("chosen", example.chosen), ("rejected", example.rejected)]
    for column, value in (*prompts, *(pair for pair in answers if pair[1] is not None)):
        if not isinstance(value, str):
            raise UserError(
                f"{place}: column {column!r} is {type(value).__name__}, needs text; "
                "mend or drop the row"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: column {column!r} holds half a surrogate pair; mend or drop the row"
            ) from error
    text = example.prompt if turns is None else None
    row = {"prompt": text, "turns": turns, "whole": example.whole, "place": place}
    return {**row, **dict(answers)}


def _write(rows: Rows, read: SourceReader, path: Path) -> Counter[str]:
    skipped: Counter[str] = Counter()
    checked, count = read.rows(rows, skipped), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(checked, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
            count += len(batch)
    if not count and skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise UserError(f"{rows.label}: none of its rows is of use ({reasons}); give other data")
    if not count:
        raise UserError(f"{rows.label}: holds no rows; give a file with at least one")
    return skipped
