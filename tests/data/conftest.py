"""Sources made on the spot: nothing outside the repository is needed."""

import json
from pathlib import Path

import pytest

from dschat.data.store import load_source
from dschat.data.user_reader import ReadOptions


@pytest.fixture
def write_rows(tmp_path: Path):
    """Write rows as JSON Lines under the test's folder and return the path as text."""

    def write(rows: list[dict], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load(write_rows, tmp_path):
    """The source of some rows, which are its train and its test rows alike."""

    def read(*rows, **reading):
        write_rows(rows, "set/train.jsonl")
        write_rows(rows, "set/test.jsonl")
        return load_source(
            str(tmp_path / "set"),
            1,
            tmp_path / "cache",
            ReadOptions(**{f"dataset_{name}": value for name, value in reading.items()}),
        )

    return read
