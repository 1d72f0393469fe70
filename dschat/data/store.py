"""Checked examples of a source, kept as memory-mapped Arrow under their content's key, or streamed.

`written_once` writes what is kept completely or not at all, by the first process. A name is a
digest of what its content is made of, so what stands under a name is never stale. The lock is the
operating system's: it ends with the process that holds it, however that ends.

`Example` is the one form of a row in memory; `SCHEMA` is its form on disk.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout

from dschat.data.config import holdout_split
from dschat.data.registry import Reader, ReadOptions
from dschat.data.sources import Finder, Rows, digest
from dschat.errors import UserError
from dschat.text.conversations import Example, Skip, Turn

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

_LOCKS, _PART = ".locks", ".tmp"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_writing: set[Path] = set()  # what this process is writing

ExampleReader = Callable[[], Iterator[Example]]


@dataclass(frozen=True)
class Source:
    """A source ready for use, its rows with the columns of `SCHEMA`.

    `skipped` counts, by reason, rows of the source's own train and test parts that it has no use
    for; they are in neither set.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    fingerprint: str
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)


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
    train_rows, test_rows = Finder().find(name)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dschat")
    read = SourceReader(name, options or ReadOptions())
    train, skipped = store(train_rows, read, folder)
    counts = {"train": skipped}
    if test_rows is not None:
        test, counts["test"] = store(test_rows, read, folder)
        digests = [train_rows.digest, test_rows.digest]
    else:
        if len(train) < 2:
            raise UserError(
                f"{train_rows.label} has 1 row and no test set beside it: give at least 2 rows"
            )
        kept, held_out = holdout_split(len(train), seed)
        train, test = train.select(kept), train.select(held_out)
        digests = [train_rows.digest, f"holdout {seed}"]
    fingerprint = digest(*digests, read.options.key(name), str(READER_VERSION))
    return Source(name, train, test, fingerprint, counts)


def stream_source(
    name: str, options: ReadOptions, skipped: Counter[str]
) -> tuple[ExampleReader, ExampleReader | None]:
    """Find the examples of a source, train and test, to be read again and again and never kept.

    Rows that the source has no use for are counted by reason in `skipped`, at every reading.

    Raises:
        UserError: nothing there; from reading, a malformed row, named by file and line.
    """
    reader = SourceReader(name, options)
    train, test = Finder(streaming=True).find(name)

    def read(rows: Rows) -> ExampleReader:
        return lambda: reader.examples(rows, skipped)

    return read(train), None if test is None else read(test)


@dataclass(frozen=True)
class SourceReader:
    """Reads the rows of one source."""

    name: str
    options: ReadOptions

    def examples(self, rows: Rows, skipped: Counter[str]) -> Iterator[Example]:
        """Yield checked examples with their places; rows without use are counted in `skipped`."""
        reader: Reader | None = None
        for place, row in rows.read():
            if not isinstance(row, Mapping):
                kind = type(row).__name__
                raise UserError(f"{place}: is {kind}, needs an object with the key 'prompt'")
            try:
                reader = reader or self.options.reader(self.name, row)
                example = replace(reader(row), place=place)
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            _check_text(example)
            yield example


def _check_text(example: Example) -> None:
    """Stop at what is not text, naming the place and the column."""
    prompt, place = example.prompt, example.place
    texts = [turn.text for turn in prompt] if isinstance(prompt, tuple) else [prompt]
    columns = [("prompt", text) for text in texts]
    sides = (("chosen", example.chosen), ("rejected", example.rejected))
    for column, value in (*columns, *(side for side in sides if side[1] is not None)):
        if not isinstance(value, str):
            raise UserError(
                f"{place}: column {column!r} is {type(value).__name__}, needs text; "
                "fix or drop the row"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: column {column!r} holds half a surrogate pair; fix or drop the row"
            ) from error


def store(rows: Rows, read: SourceReader, folder: Path) -> tuple[datasets.Dataset, dict[str, int]]:
    """Keep checked rows as memory-mapped Arrow, written once per content and options.

    Returns:
        The rows, and the counts of skipped ones by reason.
    """
    key = digest(rows.digest, rows.label, read.options.key(read.name), str(READER_VERSION))
    counts = folder / f"{key}.json"

    def write(part: Path) -> None:
        skipped: Counter[str] = Counter()
        examples, count = read.examples(rows, skipped), 0
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
            print(f"{target}: another process writes it, waiting", flush=True)
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
