"""What rows of pairs say beside their texts: margin and subset, from any source to the loss."""

import json

import pytest

from dschat.data.readers import pair_columns
from dschat.data.store import choose_reader
from dschat.data.user_reader import ReadOptions, user_reader
from dschat.errors import UserError
from tests.data.spec import Spec
from tests.helpers.tiny import byte_tokenizer

PAIR = {"prompt": "hi", "chosen": "we", "rejected": "no"}
MORE = {"margin": "1.5", "subset": 7}


def read_row(row):
    """A dataset function."""
    return {**PAIR, "margin": row["gap"]}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {side: f"\n\nHuman: hi\n\nAssistant: {PAIR[side]}" for side in ("chosen", "rejected")},
    ],
    ids=["prompt, chosen, rejected", "chosen, rejected"],
)
def test_rows_known_by_their_columns(row):
    example = choose_reader(ReadOptions(), "pairs", row | MORE)(row | MORE)
    assert (example.margin, example.subset) == (1.5, "7")
    plain = choose_reader(ReadOptions(), "pairs", row)(row)
    assert (plain.margin, plain.subset) == (None, None)


def test_a_row_without_a_rejected_answer_has_neither():
    assert pair_columns({"chosen": "we", "margin": "none", "subset": "x"}) == {}


def test_a_margin_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="column 'margin' is 'much', needs a number"):
        choose_reader(ReadOptions(), "pairs", PAIR)(PAIR | {"margin": "much"})


def test_functions_and_named_columns():
    read = user_reader("tests.data.test_pair_columns:read_row")
    assert read({"gap": 2}).margin == 2.0
    with pytest.raises(UserError, match="column 'margin' is 'x'"):
        read({"gap": "x"})
    assert ReadOptions(dataset_columns=("prompt=q", "margin=gap", "subset=kind")).dataset_columns


def test_they_reach_the_token_rows_with_the_source_and_are_counted(tmp_path):
    for name, margins in {"a": [1.5, None, None], "b": [0.5, 0.5, 0.5, 2.0]}.items():
        rows = [PAIR | {"margin": m, "subset": name.upper()} for m in margins]
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)
    names = (str(tmp_path / "a"), str(tmp_path / "b"))
    cache = str(tmp_path / "cache")
    spec = Spec(max_seq_len=64, data_path=names, data_output_path=cache)
    data = spec.make(byte_tokenizer(), 2)
    assert data.eval["margin"][:] == [1.5, None, None, 0.5, 0.5, 0.5, 2.0]
    assert data.eval["subset"][:] == ["A"] * 3 + ["B"] * 4
    assert data.eval["source"][:] == [0] * 3 + [1] * 4
    lines = data.report.lines()
    assert any(
        "pairs with a margin: 8; a reward model's loss asks for it" in line for line in lines
    )
    few = spec.but(max_eval_samples=3).make(byte_tokenizer(), 2).eval
    assert {*zip(few["source"], few["subset"], strict=True)} <= {(0, "A"), (1, "B")}
