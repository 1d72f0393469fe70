"""Room for tokenised rows: estimated closely, and missed before they are tokenised."""

import shutil
from collections import namedtuple

import numpy as np
import pytest

from dschat.data.datasets import Converter
from dschat.data.store import load_source
from dschat.data.tokenise import tokenised_bytes
from dschat.errors import UserError
from dschat.text.formats import choose_format
from dschat.utils.files import Reserve
from tests.data.spec import Spec
from tests.helpers.tiny import byte_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(write_rows) -> str:
    """Rows of very different lengths, longer ones towards the end."""
    draw = np.random.default_rng(3).integers(1, 60, 900)
    return write_rows(
        [
            {"prompt": f"say {n}", "chosen": "yes " * int(k + n // 30), "rejected": "no " * int(k)}
            for n, k in enumerate(draw)
        ]
    )


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_estimate_is_close_to_what_is_written(source, tmp_path, phase):
    tokenizer = byte_tokenizer()
    convert = Converter(tokenizer, choose_format(tokenizer), phase, 200, None)
    rows = load_source(source, 1, tmp_path / "sources").train
    spec = Spec(
        data_path=(source,),
        data_output_path=str(tmp_path / "cache"),
        max_seq_len=200,
        max_prompt_len=200,
    )
    spec.make(tokenizer, phase)
    (file,) = tmp_path.rglob("train-000.arrow")
    # 200 rows stand for all: of 1 to 60 words, mean 30 and deviation 17, drawn at random their mean
    # would be off by 17 / 30 / sqrt(200) = 4 % at one deviation.
    assert tokenised_bytes(rows, convert) == pytest.approx(file.stat().st_size, rel=0.05)
    assert tokenised_bytes(rows.select([]), convert) == 0


def test_a_disk_without_room_is_said_before_rows_are_tokenised(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 5 * 10**5, 5 * 10**5))
    folder = tmp_path / "cache"
    spec = Spec(
        data_path=(source,), data_output_path=str(folder), max_seq_len=200, max_prompt_len=9
    )
    with pytest.raises(UserError) as caught:
        spec.make(byte_tokenizer(), 2)
    assert f"data_output_path {folder}" in str(caught.value)
    assert "the tokenised rows of phase 2 take about 1." in str(caught.value)
    assert str(caught.value).endswith(
        " MB, and 500 kB are free on that disk; free some, or give a data_output_path on another "
        "disk"
    )
    assert not [*folder.rglob("train-*"), *folder.rglob("*.tmp")]
    spec.make(byte_tokenizer(), 3)  # prompts are short


def test_what_comes_onto_another_disk_takes_no_room(tmp_path):
    later = Reserve(str(tmp_path / "out" / "sft"), 7)
    assert later.on_disk_of(tmp_path / "cache") == 7
    assert later.on_disk_of("/proc/self") == 0 == Reserve("/proc/x", 7).on_disk_of(tmp_path)
