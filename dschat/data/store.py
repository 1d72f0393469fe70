"""Checked examples of a source, kept as memory-mapped Arrow under their content's key, and split.

`Example` is the one form of a row in memory; `SCHEMA` is its form on disk.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dschat.data.cache import open_folder, written_once
from dschat.data.columns import Row
from dschat.data.config import PHASES
from dschat.data.readers import FORMATS, QUESTION, STANDARD, Reader, format_by_name
from dschat.data.sources import Finder, Rows, digest
from dschat.data.user_reader import READER, ReadOptions, read_mapped, user_reader
from dschat.errors import UserError
from dschat.text.conversations import Example, Skip, Turn, kind_of
from dschat.utils.user_functions import source_digest

# Part of every stored file's key: raise it when the same bytes are to be read differently.
READER_VERSION = 4

# A prompt is either text, in `prompt`, or a conversation, in `turns`; the other is null. `whole`
# holds `Example.train_all_turns`, and `columns` a JSON object.
_TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("whole", pa.bool_()),
        ("place", pa.string()),
        ("columns", pa.string()),
        ("margin", pa.float64()),
        ("subset", pa.string()),
    ]
)

# Streams of the one seed: a held-out test set and a split among phases are independent draws.
_SPLIT_STREAM, _HOLDOUT_STREAM = 1, 2

_ROWS, _SKIPPED = "rows.arrow", "skipped.json"
_NONE_KEPT = "[[], [], false]"  # the key of `KeptColumns()`


@dataclass(frozen=True)
class Source:
    """A source ready for use, its rows with the columns of `SCHEMA`.

    `skipped` counts, by reason, rows of the source's own train and test parts that it has no use
    for; they are in neither set. `held_out` counts the test rows that were drawn from a source
    without a test part.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    fingerprint: str
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out: int = 0


def load_source(
    name: str, seed: int, cache_dir: str | Path | None = None, options: ReadOptions | None = None
) -> Source:
    """Read a source by file, folder or Hub name; without a test set, a seeded tenth becomes it.

    A file is .jsonl, .json or .parquet; a folder holds train and test (eval, validation, val, dev)
    files of one such kind, or was written by `datasets`; `local/jsonfile` is data/train.json and
    data/eval.json under the current directory, else under the repository's root. Checked rows are
    kept as Arrow under `cache_dir` (default: the user's own cache folder), keyed by content and
    options.

    Raises:
        UserError: nothing there, no rows, or a malformed row, named by file and line.
    """
    options = options or ReadOptions()
    folder = open_folder(None if cache_dir is None else str(cache_dir))
    row_format = format_by_name(name)
    # What the examples of a source depend on, beside its bytes.
    way = [*options.dataset_columns, options.dataset_function or ""]
    way.append(row_format.read.__qualname__ if row_format else "")
    way.append(options.kept.key() if options.kept is not None else _NONE_KEPT)
    if options.dataset_function:
        way.append(source_digest(options.dataset_function, READER))
    read_as = digest(*way), str(READER_VERSION)
    parts, counts, contents = [], {}, []
    for split, rows in zip(("train", "test"), Finder().find(name), strict=True):
        if rows is not None:
            contents.append(rows.digest())
            key = digest(contents[-1], rows.label, *read_as)
            write = partial(_write, rows, name, options)
            stored = written_once(folder, "sources", key, write)
            counts[split] = json.loads((stored / _SKIPPED).read_text(encoding="utf-8"))
            parts.append(datasets.Dataset.from_file(str(stored / _ROWS)))
    if len(parts) == 1:
        (part,) = parts
        if len(part) < 2:
            raise UserError(f"{name} has 1 row and no test set beside it: give at least 2 rows")
        order = np.random.default_rng([seed, _HOLDOUT_STREAM]).permutation(len(part))
        tenth = max(1, len(part) // 10)
        parts = [part.select(order[:-tenth]), part.select(order[-tenth:])]
        contents.append(f"holdout {seed}")
    held_out = len(parts[1]) if "test" not in counts else 0
    train, test = parts
    return Source(name, train, test, digest(*contents, *read_as), counts, held_out)


def _write(rows: Rows, name: str, options: ReadOptions, folder: Path) -> None:
    """Write checked rows into `folder`, and the counts of skipped ones by reason."""
    skipped: Counter[str] = Counter()
    examples, count = read_examples(rows, name, options, skipped), 0
    path = str(folder / _ROWS)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(examples, 1000)):
            stored = [vars(e) | {"whole": e.train_all_turns} for e in batch]
            for row in stored:
                if not isinstance(row["prompt"], str):
                    row["turns"], row["prompt"] = [vars(turn) for turn in row["prompt"]], None
            writer.write_batch(pa.RecordBatch.from_pylist(stored, SCHEMA))
            count += len(batch)
    if not count and skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise UserError(f"{rows.label}: none of its rows is of use ({reasons}); give other data")
    if not count:
        raise UserError(f"{rows.label}: holds no rows; give a file with at least one")
    (folder / _SKIPPED).write_text(json.dumps(skipped), encoding="utf-8")


def read_examples(
    rows: Rows, name: str, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Example]:
    """Yield the checked examples of the source `name`; rows without use are counted in `skipped`.

    Raises:
        UserError: a malformed row, named by file and line.
    """
    read: Reader | None = None
    for place, row in rows.read():
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: is {kind_of(row)}, needs an object with the key 'prompt'")
        try:
            read = read or choose_reader(options, name, row)
            example = replace(read(row), place=place)
            if options.kept:
                example = replace(example, columns=options.kept.of(row))
            _check_text(example)
        except Skip as reason:
            skipped[str(reason)] += 1
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        else:
            yield example


def choose_reader(options: ReadOptions, name: str, first: Row) -> Reader:
    """Choose the reader of the source `name`, of which `first` is a row.

    It is the user's, else that of a known name, else that of the known columns: of two formats that
    fit, the one whose columns include the other's.

    Raises:
        UserError: several formats fit that mean different things.
    """
    if options.dataset_function:
        return user_reader(options.dataset_function)
    if options.dataset_columns:
        return partial(read_mapped, options.dataset_columns)
    of_name = format_by_name(name)
    if of_name is not None and of_name.columns <= first.keys():
        return of_name.read
    fitting = [f for f in FORMATS if f.columns <= first.keys() and (not f.holds or f.holds(first))]
    fitting = [f for f in fitting if not any(f.columns < other.columns for other in fitting)]
    if len({row_format.read for row_format in fitting}) > 1:
        readings = " or ".join(", ".join(sorted(row_format.columns)) for row_format in fitting)
        raise UserError(
            f"the columns ({', '.join(first)}) can be read in several ways ({readings}); choose "
            "with --dataset_columns prompt=... chosen=... or a --dataset_function"
        )
    if not fitting and QUESTION.columns <= first.keys():
        return QUESTION.read
    return fitting[0].read if fitting else STANDARD.read


def _check_text(example: Example) -> None:
    """Refuse what is not text, naming the column."""
    prompt = example.prompt
    columns = {"chosen": [example.chosen], "rejected": [example.rejected]}
    columns["prompt"] = [turn.text for turn in prompt] if isinstance(prompt, tuple) else [prompt]
    for column in ("prompt", "chosen", "rejected"):
        for value in columns[column]:
            if value is None and column != "prompt":
                continue
            if not isinstance(value, str):
                raise UserError(
                    f"column {column!r} is {kind_of(value)}, needs text; fix or drop the row"
                )
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"column {column!r} holds half a surrogate pair; fix or drop the row"
                ) from error


def phase_split(size: int, seed: int, proportions: Sequence[float], phase: int) -> np.ndarray:
    """Rows of `phase` (1, 2 or 3) among `size`, as int64 indices in a seeded order.

    Phases do not overlap and together hold every row; each size is within one row of its
    proportion (cumulative rounding). A single proportion gives all rows to every phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(size)
    if len(proportions) == 1:
        return order
    totals = [0.0, *accumulate(proportions)]
    start, end = (
        math.floor(size * totals[bound] / totals[-1] + 0.5) for bound in (phase - 1, phase)
    )
    return order[start:end]


def examples_of(columns: Mapping[str, list[Any]]) -> list[Example]:
    """Read stored columns as the examples that were written."""
    names = (
        *("prompt", "turns", "chosen", "rejected", "whole", "place"),
        *("columns", "margin", "subset"),
    )
    return [
        Example(text if turns is None else tuple(Turn(**turn) for turn in turns), *more)
        for text, turns, *more in zip(*(columns[name] for name in names), strict=True)
    ]
