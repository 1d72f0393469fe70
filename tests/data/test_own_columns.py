"""Rows' own columns on their way from the file to a batch, kept on disk or streamed."""

import json
from dataclasses import replace

import pytest
import torch

from dschat.data.batching import build_loader
from dschat.data.collators import PromptCollator
from dschat.data.columns import KeptColumns
from dschat.data.config import DataConfig
from dschat.data.datasets import create_prompt_dataset
from dschat.errors import UserError

ROWS = [
    {
        "question": f"{n} + {n}?",
        "answer": f"{n}...\n#### {2 * n}",
        "exact": [n, 0.1 * n, -(2**70), None, True, {"a": "ü\u2028"}],
        "empty": None if n % 2 else "",
    }
    for n in range(9)
]
ALL = KeptColumns(everything=True, asked_by="f")


@pytest.fixture
def data(write_rows, tmp_path, byte_tokenizer):
    write_rows(ROWS, "set/train.jsonl")
    write_rows(ROWS[:2], "set/test.jsonl")
    base = DataConfig(data_path=(str(tmp_path / "set"),), data_output_path=str(tmp_path / "cache"))

    def make(kept=ALL, **changes):
        config = replace(base, read=replace(base.read, kept=kept), **changes)
        return create_prompt_dataset(
            config, byte_tokenizer, 3, seed=1, max_seq_len=64, max_prompt_len=64
        )

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_every_value_arrives_as_it_stands_in_the_file(data, streaming):
    rows = data(streaming=streaming).train
    loader = build_loader(rows, PromptCollator(0), 2, rank=0, world_size=1, seed=1, shuffle=True)
    batches = list(loader)
    found = [columns for batch in batches for columns in batch.columns]
    assert sorted(map(repr, found)) == sorted(map(repr, ROWS))
    batch = batches[0].to("meta")
    assert batch.input_ids.is_meta and batch.columns == batches[0].columns
    twice = batches[0].rows(torch.tensor([1, 1, 0]))
    assert twice.columns == tuple(batches[0].columns[at] for at in (1, 1, 0))


def test_only_what_is_asked_for_is_kept_and_each_choice_is_a_set_of_its_own(data):
    some = data(KeptColumns(needed=("answer",), others=("none",), asked_by="f"))
    assert json.loads(some.eval["columns"][0]) == {"answer": "0...\n#### 0"}
    none = data(KeptColumns())
    assert set(none.train["columns"]) == {None}
    assert len({some.key, none.key, data().key}) == 3 and data().key == data().key
    with pytest.raises(UserError, match=r"train\.jsonl line 1: no column 'key', which f takes"):
        data(KeptColumns(needed=("key",), asked_by="f"))
