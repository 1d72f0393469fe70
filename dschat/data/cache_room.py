"""Room on the disk for tokenised rows, estimated from a sample before all are tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np

from dschat.data.store import examples_of
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.utils.disk import Reserve, free_bytes, in_words

SAMPLE = 200  # rows of a source and split


def tokenised_bytes(rows: datasets.Dataset, convert: Converter) -> int:
    """Estimate the bytes of rows once they are tokenised, from some that lie at even distances."""
    if not len(rows):
        return 0
    places = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)
    columns = convert(examples_of(rows[places]), Counter())
    table = datasets.Dataset.from_dict(columns, convert.features).data
    return round(table.nbytes / len(places) * len(rows))


def check_room(
    parts: Iterable[datasets.Dataset], convert: Converter, folder: Path, later: Reserve | None
) -> None:
    """Stop where the disk of the cache is too small for rows that will be tokenised there.

    Args:
        later: what the run writes after them.

    Raises:
        UserError: with the bytes needed and those free.
    """
    needed = sum(tokenised_bytes(rows, convert) for rows in parts)
    beside = later.on_disk_of(folder) if later is not None else 0
    free = free_bytes(folder)
    if needed + beside > free:
        models = f", the models of the run {in_words(beside)}" if beside else ""
        raise UserError(
            f"data_output_path {folder}: the tokenised rows of phase {convert.phase} take about "
            f"{in_words(needed)}{models}, and {in_words(free)} are free on that disk; free some, "
            "or give a data_output_path on another disk"
        )
