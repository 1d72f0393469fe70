"""Checked examples of a source, kept as memory-mapped Arrow under their content's key, and split.

`written_once` writes what is kept completely or not at all, by the first process. A name is a
digest of what its content is made of, so what stands under a name is never stale. The lock is the
operating system's: it ends with the process that holds it, however that ends.

`Example` is the one form of a row in memory; `SCHEMA` is its form on disk.
"""

import ctypes
import json
import math
import os
import shutil
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from dschat.data.readers import format_by_name
from dschat.data.sources import Finder, Rows, digest, read_examples
from dschat.data.user_reader import READER, ReadOptions
from dschat.errors import UserError
from dschat.text.conversations import Example, Turn
from dschat.utils.printable import printable
from dschat.utils.user_functions import source_digest

PHASES = (1, 2, 3)

# Part of every stored file's key: raise it when the same bytes are to be read differently.
READER_VERSION = 2

# A prompt is either text, in `prompt`, or a conversation, in `turns`; the other is null. `whole`
# holds `Example.train_all_turns`.
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

# Streams of the one seed: a held-out test set and a split among phases are independent draws.
SPLIT_STREAM, _HOLDOUT_STREAM = 1, 2

_LOCKS, _PART = ".locks", ".tmp"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_writing: set[Path] = set()  # what this process is writing


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
    kept as Arrow under `cache_dir` (default: the `datasets` cache), keyed by content and options.

    Raises:
        UserError: nothing there, no rows, or a malformed row, named by file and line.
    """
    options = options or ReadOptions()
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dschat")
    parts, counts, contents = [], {}, []
    for split, rows in zip(("train", "test"), Finder().find(name), strict=True):
        if rows is not None:
            contents.append(rows.digest())
            part, counts[split] = _store(rows, contents[-1], name, options, folder)
            parts.append(part)
    if len(parts) == 1:
        (rows,) = parts
        if len(rows) < 2:
            raise UserError(f"{name} has 1 row and no test set beside it: give at least 2 rows")
        parts = [rows.select(part) for part in holdout_split(len(rows), seed)]
        contents.append(f"holdout {seed}")
    held_out = len(parts[1]) if "test" not in counts else 0
    fingerprint = digest(*contents, _way_to_read(name, options), str(READER_VERSION))
    train, test = parts
    return Source(name, train, test, fingerprint, counts, held_out)


def _way_to_read(name: str, options: ReadOptions) -> str:
    """Digest what the examples of a source depend on, beside its bytes."""
    row_format = format_by_name(name)
    reader = row_format.read.__qualname__ if row_format else ""
    parts = [*options.dataset_columns, options.dataset_function or "", reader]
    if options.dataset_function:
        parts.append(source_digest(options.dataset_function, READER))
    return digest(*parts)


def _store(
    rows: Rows, content: str, name: str, options: ReadOptions, folder: Path
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Keep checked rows as memory-mapped Arrow, written once per content and options.

    Returns:
        The rows, and the counts of skipped ones by reason.
    """
    key = digest(content, rows.label, _way_to_read(name, options), str(READER_VERSION))
    counts = folder / f"{key}.json"

    def write(part: Path) -> None:
        skipped: Counter[str] = Counter()
        examples, count = read_examples(rows, name, options, skipped), 0
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            while batch := list(islice(examples, 1000)):
                writer.write_batch(pa.RecordBatch.from_pydict(columns_of(batch), schema=SCHEMA))
                count += len(batch)
        if not count and skipped:
            reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
            raise UserError(
                f"{rows.label}: none of its rows is of use ({reasons}); give other data"
            )
        if not count:
            raise UserError(f"{rows.label}: holds no rows; give a file with at least one")
        # First the counts, and both complete: whoever finds the rows finds them too.
        part_counts = part.with_suffix(".counts")
        part_counts.write_text(json.dumps(skipped), encoding="utf-8")
        part_counts.replace(counts)

    target = written_once(folder, f"{key}.arrow", write)
    skipped = json.loads(counts.read_text(encoding="utf-8"))
    return datasets.Dataset.from_file(str(target)), skipped


def parse_proportions(text: str) -> tuple[float, ...]:
    """Read `data_split`: "2,4,4" (one number a phase) or "10" (every row in every phase).

    Raises:
        UserError: another count, not a number, negative, or all zero.
    """
    remedy = 'give three numbers such as "2,4,4", or one for all rows in every phase'
    try:
        proportions = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"data_split {text!r} holds what is not a number: {remedy}") from error
    if len(proportions) not in (1, len(PHASES)):
        raise UserError(f"data_split {text!r} has {len(proportions)} numbers: {remedy}")
    if not all(math.isfinite(value) and value >= 0 for value in proportions):
        raise UserError(f"data_split {text!r} has a negative or infinite number: {remedy}")
    if not any(proportions):
        raise UserError(f"data_split {text!r} is all zero: {remedy}")
    return proportions


def holdout_split(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of a source without a test set: a tenth, at least one row, is test."""
    order = np.random.default_rng([seed, _HOLDOUT_STREAM]).permutation(size)
    cut = size - max(1, size // 10)
    return order[:cut], order[cut:]


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Columns of `SCHEMA` for examples; `examples_of` reads them back."""
    prompts = [e.prompt for e in examples]
    return {
        "prompt": [prompt if isinstance(prompt, str) else None for prompt in prompts],
        "turns": [None if isinstance(p, str) else [vars(turn) for turn in p] for p in prompts],
        "chosen": [e.chosen for e in examples],
        "rejected": [e.rejected for e in examples],
        "whole": [e.train_all_turns for e in examples],
        "place": [e.place for e in examples],
    }


def examples_of(columns: Mapping[str, list[Any]]) -> list[Example]:
    """Read stored columns back as examples."""
    names = ("prompt", "turns", "chosen", "rejected", "whole", "place")
    return [
        Example(text if turns is None else tuple(Turn(**turn) for turn in turns), *more)
        for text, turns, *more in zip(*(columns[name] for name in names), strict=True)
    ]


def written_once(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Give `root / name`, which `write(path)` writes under another name first unless it is there.

    Other processes of this machine that want it wait for the first one, and take over when that is
    killed. What killed writers left under `root` is removed.

    Raises:
        UserError: `root` cannot be written or locked, or its disk is full; nothing is left over.
    """
    target = root / name
    if target.exists():
        return target
    try:
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _LOCKS / name)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            print(printable(f"{target}: another process writes it, waiting"), flush=True)
            held = lock.acquire(poll_interval=0.1)
        with held:
            if target.exists():
                return target
            _sweep(root, name)
            part = root / f"{name}.{uuid.uuid4().hex}{_PART}"
            _writing.add(target)
            try:
                write(part)
                part.rename(target)
            finally:
                _writing.discard(target)
                _remove(part)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{root} cannot be written ({reason}): free some space or give another data_output_path"
        ) from error
    return target


def _sweep(root: Path, name: str) -> None:
    """Remove the unfinished files of processes that are gone: nobody holds their locks."""
    for part in root.glob(f"*{_PART}"):
        owner = part.name.rsplit(".", 2)[0]
        if owner == name:  # this process holds its lock
            _remove(part)
            continue
        try:
            with FileLock(root / _LOCKS / owner, blocking=False):
                _remove(part)
        except Timeout:
            pass


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_child() -> None:
    """End a process that was forked in the middle of writing with its parent.

    A worker would outlive a killed parent, waiting for work that does not come.
    """
    if _writing and sys.platform == "linux":
        _writing.clear()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


os.register_at_fork(after_in_child=_in_child)
