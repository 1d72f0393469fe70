"""Rows of files, each with its place, and digests of their bytes."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dschat.errors import RepeatedKeyError, UserError, brief, unique_keys

# Raised by Arrow's readers for damaged files; a text that is not UTF-8 is a ValueError.
BROKEN = (pa.ArrowException, OSError, ValueError)
TEXT_COLUMN = "text"  # of the one row that a .txt file is


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


def short_name(path: Path) -> str:
    """Name a file with its folder: many sources have a train.jsonl."""
    return str(Path(*path.parts[-2:]))


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Read the rows of files, each with its place."""
    for path in paths:
        name = short_name(path)
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".txt":
            yield name, {TEXT_COLUMN: _decoded(path.read_bytes(), name, 1)}
        else:
            with path.open("rb") as file:
                start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
                file.seek(0)
                if path.suffix == ".json" and start.startswith(b"["):
                    for number, row in enumerate(_parse(file.read(), name, 1), 1):
                        yield f"{name} row {number}", row
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name} line {number}", _parse(line, name, number)


def _parse(text: bytes, name: str, first_line: int) -> Any:
    decoded = _decoded(text, name, first_line).rstrip()
    line = first_line
    try:
        return json.loads(decoded, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        problem, remedy = f"{error} in one object", "drop one of them"
        if decoded.lstrip().startswith("["):
            line += _line_of_fault(decoded)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"not JSON ({error.msg}, column {error.colno})"
        remedy = "give one object a line, or in .json a list of objects"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        problem, remedy = f"cannot be read ({brief(error)})", "fix or drop the row"
    raise UserError(f"{name} line {line}: {problem}; {remedy}")


def _line_of_fault(rows: str) -> int:
    """Count the lines before the first row of a list that holds a key twice."""
    decoder, at = json.JSONDecoder(object_pairs_hook=unique_keys), 0
    between = re.compile(r"[\s,\[]*")
    while (match := between.match(rows, at)) is not None:
        try:
            _, at = decoder.raw_decode(rows, match.end())
        except RepeatedKeyError:
            return rows.count("\n", 0, match.end())
    return 0


def _decoded(text: bytes, name: str, first_line: int) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise UserError(f"{name} line {line}: not UTF-8 text; save the file as UTF-8") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    name, number = short_name(path), 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", row
    except BROKEN as error:
        place = f" after row {number}" if number else ""
        raise UserError(
            f"{name}: not a readable parquet file{place} ({brief(error)}); write it again"
        ) from error
