"""Rows of JSON, JSON Lines and Parquet files, streamed, each with the place it stands at."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dschat.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Rows:
    """Rows not yet read: what they are called, how to digest their content and how to read them."""

    label: str
    digest_of: Callable[[], str]
    read: Callable[[], Iterator[tuple[str, Any]]]  # yields (place, row)

    @cached_property
    def digest(self) -> str:
        """Of the content; the first time, all of it is read."""
        return self.digest_of()


def file_rows(paths: Sequence[Path]) -> Rows:
    """The rows of files, one file after the other.

    Raises:
        UserError: a file of another kind or unreadable; from `read`, a malformed line by number.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"--data_path {path}: files of kind {path.suffix!r} are not read; "
                f"give one of {', '.join(SUFFIXES)}"
            )
    label = ", ".join(map(_name, paths))
    return Rows(label, lambda: digest_files(paths), lambda: chain.from_iterable(map(_read, paths)))


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) over the bytes of files, so that an edited file is another source."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check it") from error
        total.update(b"\0")
    return total.hexdigest()


def digest(*parts: str) -> str:
    """SHA-256 (hex) of a list of texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _name(path: Path) -> str:
    """The file with its folder: many sources have a train.jsonl."""
    return str(Path(*path.parts[-2:]))


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    with path.open("rb") as file:
        start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    is_list = path.suffix == ".json" and start.startswith(b"[")
    return _read_json_list(path) if is_list else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{_name(path)} line {number}", _parse(line, _name(path), number)


def _read_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parse(path.read_bytes(), _name(path), 1), 1):
        yield f"{_name(path)} row {number}", row


def _parse(text: bytes, name: str, first_line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise UserError(f"{name} line {line}: not UTF-8 text; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{name} line {line}: not JSON ({error.msg}, column {error.colno}); "
            "give one object a line, or in .json a list of objects"
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{_name(path)} row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{_name(path)}: not a readable parquet file; write it again") from error
