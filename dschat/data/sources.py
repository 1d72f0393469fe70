"""Where rows come from: files, folders and Hub sets, found by name and divided into two."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dschat.data.files import SUFFIXES, Rows, digest, digest_files, file_rows
from dschat.data.registry import LOCAL_JSON, ON_THE_HUB, ReadOptions
from dschat.data.splits import holdout_split
from dschat.data.store import READER_VERSION, SourceReader, store
from dschat.errors import UserError, brief

# The first name that is present is the set; those behind are how some sets name their parts.
TRAIN_NAMES = ("train", "train_prefs", "train_sft")
TEST_NAMES = ("test", "eval", "validation", "val", "dev", "test_prefs", "test_sft")


RowReader = Callable[[], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """A source ready for use, its rows with the columns of `row_store.SCHEMA`.

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
    kept as Arrow under `cache_dir` (default: the `datasets` cache), keyed by content and reading.

    Raises:
        UserError: nothing there, no rows, or a malformed row, named by file and line.
    """
    train_rows, test_rows = _find(name)
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
    return Source(name, train, test, digest(*digests, read.key, str(READER_VERSION)), counts)


def stream_source(
    name: str, options: ReadOptions, skipped: Counter[str]
) -> tuple[RowReader, RowReader | None]:
    """What reads the checked rows of a source, train and test, without keeping any.

    Rows that the source has no use for are counted by reason in `skipped`, at every reading.

    Raises:
        UserError: nothing there; from reading, a malformed row, named by file and line.
    """
    read = SourceReader(name, options)
    train, test = (
        rows and partial(read.rows, rows, skipped) for rows in _find(name, streaming=True)
    )
    return train, test


def _find(name: str, streaming: bool = False) -> tuple[Rows, Rows | None]:
    """The train rows of a source, and its test rows if it has some; from the Hub, downloaded."""
    path = Path(name).expanduser()
    if name == LOCAL_JSON:
        return _local_json()
    if path.is_file():
        return file_rows([path]), None
    if path.is_dir():
        return _folder(path)
    spelt_as_path = name.startswith((".", os.sep, "~")) or path.suffix in SUFFIXES
    if spelt_as_path or (os.sep in name and path.parent.is_dir()):
        raise UserError(f"--data_path {name}: no such file or folder; check the path")
    options = {"streaming": True} if streaming else {}
    try:
        loaded = datasets.load_dataset(*ON_THE_HUB.get(name, (name,)), **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--data_path {name}: not a file or folder here, and the Hub did not give it "
            f"({brief(error)}); check the name and the connection, or download it and give its "
            "folder"
        ) from error
    digests = {split: partial(getattr, rows, "_fingerprint") for split, rows in loaded.items()}
    return _splits(name, loaded, digests)


def _local_json() -> tuple[Rows, Rows | None]:
    roots = (Path.cwd(), Path(__file__).resolve().parents[3])
    for root in roots:
        train, test = root / "data" / "train.json", root / "data" / "eval.json"
        if train.is_file() and test.is_file():
            return file_rows([train]), file_rows([test])
    looked = " and ".join(str(root / "data") for root in dict.fromkeys(roots))
    raise UserError(f"--data_path {LOCAL_JSON} needs train.json and eval.json; none in {looked}")


def _folder(path: Path) -> tuple[Rows, Rows | None]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    train = _named(files, TRAIN_NAMES, path)
    test = _named(files, TEST_NAMES, path)
    if not train and len(files) == 1 and not test:
        train = files
    if not train:
        raise UserError(
            f"--data_path {path}: no train file in this folder; name one "
            f"train{', train'.join(SUFFIXES)} (and test likewise)"
        )
    return file_rows(train), file_rows(test) if test else None


def _named(files: list[Path], names: tuple[str, ...], folder: Path) -> list[Path]:
    """The files called `name` or `name-<shard>`, for the first of `names` that has some."""
    for name in names:
        found = [file for file in files if file.stem == name or file.stem.startswith(f"{name}-")]
        if len({file.suffix for file in found}) > 1:
            listed = ", ".join(file.name for file in found)
            raise UserError(f"--data_path {folder} holds {listed}: keep files of one kind")
        if found:
            return found
    return []


def _saved(path: Path) -> tuple[Rows, Rows | None]:
    """A folder written by `save_to_disk`; its digest is that of its data files."""
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"--data_path {path}: not a whole `datasets` folder ({type(error).__name__}); "
            "save it again"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict(train=loaded)
        digests = {"train": partial(digest_files, sorted(path.glob("data-*.arrow")))}
    else:
        digests = {
            split: partial(digest_files, sorted((path / split).glob("data-*.arrow")))
            for split in loaded
        }
    return _splits(path.name, loaded, digests)


def _splits(
    label: str, loaded: datasets.DatasetDict, digests: Mapping[str, Callable[[], str]]
) -> tuple[Rows, Rows | None]:
    def rows(split: str) -> Rows:
        def read() -> Iterator[tuple[str, Any]]:
            for number, row in enumerate(loaded[split], 1):
                yield f"{label} {split} row {number}", row

        return Rows(f"{label} {split}", digests[split], read)

    train = next((split for split in TRAIN_NAMES if split in loaded), None)
    if train is None:
        raise UserError(f"--data_path {label}: no split 'train' (splits: {', '.join(loaded)})")
    test = next((split for split in TEST_NAMES if split in loaded), None)
    return rows(train), rows(test) if test else None
