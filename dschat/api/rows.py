"""Rows in memory become a file of the cache, which the steps read like any other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dschat.data.cache import open_folder, written_once
from dschat.data.sources import digest
from dschat.errors import UserError


def is_named(value: object) -> bool:
    """Return whether a value of `data_path` is a name or path, or a list of them."""
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, str | os.PathLike) for part in parts)


def as_files(value: Any, setting: str, cache: str | None = None) -> str:
    """Write rows into the cache, under their content's digest; return the name of their source.

    Args:
        value: rows as mappings: a list, a generator, a `datasets.Dataset` or a pandas frame; or
            those of several splits by name, such as train and test.
        setting: whose value it is, for messages. cache: as `data_output_path`.

    Raises:
        UserError: something else, or a row that JSON cannot hold.
    """
    splits = dict(value) if isinstance(value, Mapping) else {"train": value}
    files = {f"{split}.jsonl": _text(rows, setting) for split, rows in splits.items()}

    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    key = digest(*files, *files.values())[:16]
    return str(written_once(open_folder(cache), "rows", key, write))


def _text(rows: Any, setting: str) -> str:
    """Write rows as lines of JSON."""
    if hasattr(rows, "to_dict") and hasattr(rows, "notna"):  # a pandas frame
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise UserError(
            f"{setting} is of type {type(rows).__name__}: give a path, or rows as a list of "
            "mappings, a datasets.Dataset or a pandas frame"
        )
    return "".join(_lines(rows, setting))


def _lines(rows: Iterable[Any], setting: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        place = f"{setting} row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{place} is of type {type(row).__name__}, needs a mapping of columns")
        try:
            known = {name: None if _is_missing(cell) else cell for name, cell in row.items()}
            yield json.dumps(known, ensure_ascii=False, default=_native) + "\n"
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {error}; fix or drop the row") from error


def _is_missing(cell: object) -> bool:
    """Return whether a cell is what pandas has in the place of nothing."""
    return isinstance(cell, float | np.floating) and math.isnan(cell)


def _native(value: Any) -> Any:
    """Turn what numpy holds into what JSON does."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} is no JSON")
