"""Columns mapped by flag, and the user's own function."""

import sys

import pytest

from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from tests.data.meanings import meaning

ASK = {"role": "user", "content": "hi"}
ASKED = (("user", "hi"),)
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: we\n\nHuman: so\n\nAssistant:"


def test_columns_are_mapped_from_inside_fields(load):
    row = {"q": {"text": "hi", "n": 1}, "a": [{"t": "lo"}, {"t": "no"}], "b.c": "x"}
    columns = ("prompt=q.text", "chosen=a.0.t", "rejected=a.1.t")
    assert meaning(load(row, columns=columns).train[0]) == (ASKED, "lo", "no", False)
    columns = ("prompt=b.c", "chosen=a.5.t")
    assert meaning(load(row, columns=columns).train[0]) == ((("user", "x"),), None, None, False)
    # Another mapping of the same bytes is another source, and what is in the format stays.
    row = {"t": TRANSCRIPT, "m": [ASK], "g": " a"}
    assert meaning(load(row, columns=("prompt=t", "chosen=g")).train[0])[:2] == (TRANSCRIPT, " a")
    assert meaning(load(row, columns=("prompt=m", "chosen=g")).train[0])[:2] == (ASKED, " a")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt",), "dataset_columns 'prompt': give prompt=COLUMN"),
        (("question=prompt",), "dataset_columns 'question=prompt': give prompt=COLUMN"),
        (("prompt=a", "prompt=b"), "each once"),
        (("chosen=a",), "names no prompt: add prompt=COLUMN"),
        (("prompt=q.nothing",), "line 1: no column 'q.nothing' (columns: q)"),
        (("prompt=q",), "line 1: column 'prompt' is an object, needs text"),
    ],
)
def test_mappings_that_cannot_be_are_refused(columns, words, load):
    with pytest.raises(UserError) as caught:
        load({"q": {"text": "hi"}}, columns=columns)
    assert words in str(caught.value)


OWN = """
from dschat.text.conversations import Example, Turn

def record(row):
    return {"prompt": [{"role": "user", "content": row["q"]}], "chosen": row["a"]}

def example(row):
    return Example((Turn("user", row["q"]),), row["a"], train_all_turns=True) if row["q"] else None

def text(row):
    return {"prompt": row["q"], "chosen": row["a"]}

def wrong(row):
    return row["q"]

def late(row):
    return {"prompt": row["q"], "chosen": len(row["a"])}

def order(row):
    return Example((Turn("assistant", "a"),), "b")

def turns(row):
    return Example(("hi",), "b")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of functions in the current folder."""
    (tmp_path / "own_reader.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "own_reader.py"
    sys.modules.pop("own_reader", None)


def test_functions_read_rows(own, load):
    row = {"q": "hi", "a": "lo"}
    means = {
        "record": (ASKED, "lo", None, False),
        "example": (ASKED, "lo", None, True),
        "text": ("hi", "lo", None, False),
    }
    for name, expected in means.items():
        assert meaning(load(row, function=f"own_reader:{name}").train[0]) == expected
    source = load(row, {"q": "", "a": ""}, function="own_reader:example")
    assert source.skipped["train"] == {"left out by dataset_function": 1}


def test_an_edited_function_reads_anew(own, load):
    row = {"q": "hi", "a": "lo"}
    before = load(row, function="own_reader:text")
    own.write_text(OWN.replace('"chosen": row["a"]', '"chosen": row["a"] + "!"'))
    sys.modules.pop("own_reader")
    after = load(row, function="own_reader:text")
    assert (before.train[0]["chosen"], after.train[0]["chosen"]) == ("lo", "lo!")
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("own_reader", "give module:name"),
        ("no_such_module:f", "no_such_module does not import (ModuleNotFoundError: No module"),
        ("own_reader:nothing", "own_reader has no function 'nothing'"),
        ("own_reader:wrong", "line 1: dataset_function own_reader:wrong returned str"),
        ("own_reader:record", "line 2: dataset_function own_reader:record fails (KeyError: 'q')"),
        ("own_reader:late", "line 1: column 'chosen' is a number, needs text"),
        ("own_reader:order", "line 1: column 'prompt', message 1: is from assistant where user"),
        ("own_reader:turns", "line 1: column 'prompt', message 1: is 'hi', needs a Turn"),
    ],
)
def test_functions_that_fail_are_named_with_their_row(function, words, own, load):
    with pytest.raises(UserError) as caught:
        load({"q": "hi", "a": "lo"}, {"a": "lo"}, function=function)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_one_way_of_reading_at_a_time():
    with pytest.raises(UserError, match="contradict: drop one"):
        ReadOptions(("prompt=a",), "m:f")
