"""Rows of a parquet file, which may say anything of itself, and hold more than any memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dschat.errors import UserError, brief
from dschat.utils.bounded import TooMuchError, bounded

# Raised by Arrow's readers for damaged files; a text that is not UTF-8 is a ValueError.
BROKEN = (pa.ArrowException, OSError, ValueError)
# A parquet file of text is some ten times smaller than its text; beyond so many times it is a trap.
GROWTH, MANY, MANY_BYTES = 500, 10**7, 10**9
# Read at a time. What the file says of its size may be false: one text may stand for every row.
ROWS, ROWS_SECONDS, ROWS_BYTES = 64, 60.0, 4e9


def read_parquet(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Read the rows, each with its place, which begins with the name.

    Raises:
        UserError: the file is damaged, or unpacks to what no memory holds.
    """
    number = 0
    try:
        file = pq.ParquetFile(path)
        _check_growth(name, path.stat().st_size, file.metadata)
        batches = file.iter_batches(batch_size=ROWS)
        while rows := _next(batches, name):
            for row in rows:
                number += 1
                yield f"{name} row {number}", row
    except UserError:
        raise
    except TooMuchError as error:
        raise UserError(
            f"{name}: {ROWS} rows after row {number} take {error}; write it again"
        ) from error
    except BROKEN as error:
        place = f" after row {number}" if number else ""
        raise UserError(
            f"{name}: not a readable parquet file{place} ({brief(error)}); write it again"
        ) from error


def _next(batches: Iterator[pa.RecordBatch], name: str) -> list[dict[str, Any]]:
    """Unpack the next rows; none at the end. A batch without rows may stand between others."""
    with bounded(ROWS_SECONDS, ROWS_BYTES, f"{name}: does not unpack; write it again"):
        return next((batch.to_pylist() for batch in batches if batch.num_rows), [])


def _check_growth(name: str, size: int, metadata: pq.FileMetaData) -> None:
    """Stop at a file of little that says that it unpacks to what no memory or disk holds.

    Raises:
        UserError: with what it would become.
    """
    rows = metadata.num_rows
    if rows > MANY and rows > GROWTH * size:
        raise UserError(f"{name}: says {rows:,} rows in {size:,} bytes; write it again")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if column.num_values > MANY and column.num_values > GROWTH * size:
                raise UserError(
                    f"{name}: column {column.path_in_schema!r} says {column.num_values:,} values "
                    f"in {size:,} bytes; write it again"
                )
            if unpacked > MANY_BYTES and unpacked > GROWTH * packed:
                raise UserError(
                    f"{name}: column {column.path_in_schema!r} unpacks {packed:,} bytes to "
                    f"{unpacked:,}; write it again"
                )
