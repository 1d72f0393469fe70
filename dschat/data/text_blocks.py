"""Plain text as blocks of tokens, all of one length, for language modelling; kept as Arrow.

Texts stand one behind the other, each with the tokenizer's own beginning and an end token, and are
cut into blocks without padding; what is left at the end makes no block. Nothing keeps the texts of
one block apart, as in pretraining.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import written_once
from dschat.data.files import SUFFIXES, Rows, digest, digest_files, file_rows
from dschat.errors import UserError, brief
from dschat.text.encoding import encode
from dschat.text.tokenizer import tokenizer_fingerprint
from dschat.utils.module.model_source import is_local

# Part of every stored set's key: raise it when the same texts are to become other blocks.
VERSION = 1
FLAG = "--unsupervised_dataset_name"
COLUMN = "text"
KINDS = (".txt", *SUFFIXES)
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True)
class TextBlocks:
    """Rows of `input_ids`, each of `length` tokens."""

    blocks: datasets.Dataset
    length: int
    key: str  # digest of texts, tokenizer and length


def create_text_blocks(
    name: str,
    config: str | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    cache: str,
    once: Callable[[Callable[[], str]], str] | None = None,
) -> TextBlocks:
    """The blocks of a source, tokenised once by one process.

    Args:
        name: a .txt file (one text), a .jsonl, .json or .parquet file with a column `text`, a
            folder of files of one such kind, one written by `datasets`, or a hub id.
        config: the configuration of a hub id.
        once: as in `create_prompt_dataset`.

    Raises:
        UserError: nothing there, a row without text, or less text than one block.
    """

    def prepare() -> str:
        rows = text_rows(name, config)
        key = digest(tokenizer_fingerprint(tokenizer), rows.digest, f"{length} {VERSION}")
        write = partial(_write, rows, tokenizer, length)
        return str(written_once(Path(cache).expanduser(), f"{key}.blocks.arrow", write))

    path = Path(prepare() if once is None else once(prepare))
    return TextBlocks(datasets.Dataset.from_file(str(path)), length, path.name.partition(".")[0])


def text_rows(name: str, config: str | None) -> Rows:
    """The rows of a source, not read yet.

    Raises:
        UserError: nothing there, or not of a kind that is read.
    """
    path = Path(name).expanduser()
    if not (path.exists() or is_local(name) or path.suffix in KINDS):
        return _hub_rows(name, config)
    if config is not None:
        raise UserError(
            f"--unsupervised_dataset_config_name {config}: {name} is a file or folder, which has "
            "no configurations; drop it"
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_rows(path)
    if path.is_dir():
        return _files(_of_one_kind(path))
    if not path.is_file():
        raise UserError(f"{FLAG} {name}: no such file or folder; check the path")
    if path.suffix not in KINDS:
        raise UserError(
            f"{FLAG} {name}: files of kind {path.suffix!r} are not read; give {', '.join(KINDS)}"
        )
    return _files([path])


def _files(paths: list[Path]) -> Rows:
    if paths[0].suffix != ".txt":
        return file_rows(paths)

    def read() -> Iterator[tuple[str, dict[str, str]]]:
        for path in paths:
            try:
                yield path.name, {COLUMN: path.read_text(encoding="utf-8-sig")}
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from error

    label = ", ".join(path.name for path in paths)
    return Rows(label, partial(digest_files, paths), read)


def _of_one_kind(folder: Path) -> list[Path]:
    """The folder's files, those called train alone where there are such."""
    files = sorted(f for f in folder.iterdir() if f.suffix in KINDS and f.is_file())
    files = [f for f in files if f.stem == "train" or f.stem.startswith("train-")] or files
    if not files:
        raise UserError(f"{FLAG} {folder}: holds no file of kind {', '.join(KINDS)}")
    if len({f.suffix for f in files}) > 1:
        listed = ", ".join(f.name for f in files[:5])
        raise UserError(f"{FLAG} {folder} holds {listed}: keep files of one kind")
    return files


def _saved_rows(path: Path) -> Rows:
    """A folder written by `save_to_disk`: its train part, or all of it."""
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{FLAG} {path}: not a whole `datasets` folder ({type(error).__name__}); save it again"
        ) from error
    parts = path
    if isinstance(loaded, datasets.DatasetDict):
        loaded, parts = _train(loaded, str(path)), path / "train"
    files = sorted(parts.glob("data-*.arrow"))
    return _dataset_rows(path.name, loaded, partial(digest_files, files))


def _hub_rows(name: str, config: str | None) -> Rows:
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{FLAG} {name}: not a file or folder here, and the Hub did not give it "
            f"({brief(error)}); check the name, --unsupervised_dataset_config_name and the "
            "connection"
        ) from error
    train = _train(loaded, name)
    return _dataset_rows(name, train, lambda: train._fingerprint)


def _train(loaded: datasets.DatasetDict, name: str) -> datasets.Dataset:
    if "train" not in loaded:
        raise UserError(f"{FLAG} {name}: no split 'train' (splits: {', '.join(loaded)})")
    return loaded["train"]


def _dataset_rows(label: str, rows: datasets.Dataset, digest_of: Callable[[], str]) -> Rows:
    def read() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(rows, 1):
            yield f"{label} row {number}", row

    return Rows(label, digest_of, read)


def _texts(rows: Rows) -> Iterator[str]:
    """Every text that says something."""
    for place, row in rows.read():
        text = row.get(COLUMN) if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            found = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise UserError(
                f"{FLAG}: {place}: no text in a column {COLUMN!r} (found: {found}); rename the "
                "column, or mend the row"
            )
        if text.strip():
            yield text


def _write(rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int, path: Path) -> None:
    texts, waiting, count = _texts(rows), [], 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(texts, _TEXTS_AT_A_TIME)):
            for ids in encode(tokenizer, batch):
                # Some tokenizers put an end token there themselves.
                has_end = ids[-1:] == [tokenizer.eos_token_id]
                waiting += ids if has_end else [*ids, tokenizer.eos_token_id]
            whole = len(waiting) // length
            if whole:
                blocks = [waiting[i * length : (i + 1) * length] for i in range(whole)]
                writer.write_batch(pa.record_batch([pa.array(blocks, SCHEMA[0].type)], SCHEMA))
                waiting, count = waiting[whole * length :], count + whole
    if not count:
        raise UserError(
            f"{FLAG} {rows.label}: {len(waiting)} tokens, less than one block of {length} "
            "(--max_prompt_seq_len + --max_answer_seq_len); give more text"
        )
