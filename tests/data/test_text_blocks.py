"""Plain text from every kind of source, as blocks of tokens of one length."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from dschat.data.text_blocks import TextBlocks, create_text_blocks
from dschat.errors import UserError

TEXTS = ["hi all", "low", "  \n", "we go"]
EOS = 0


@pytest.fixture
def make(tmp_path, byte_tokenizer) -> Callable[..., TextBlocks]:
    def create(
        source: Path | str, length: int = 4, config: str | None = None, keeps: bool = False
    ) -> TextBlocks:
        cache = str(tmp_path / "cache")
        return create_text_blocks(
            str(source), config, byte_tokenizer, length, cache, keep_special_tokens=keeps
        )

    return create


def rows_of(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """One behind the other, an end token behind each."""
    return [i for text in texts for i in (*tokenizer(text)["input_ids"], EOS)]


def assert_blocks(found: TextBlocks, texts: list[str], tokenizer, length: int = 4) -> None:
    ids = ids_of(texts, tokenizer)
    whole = len(ids) // length
    assert whole > 1 and len(ids) % length  # there is something to leave out
    expected = [ids[i * length : (i + 1) * length] for i in range(whole)]
    assert found.blocks["input_ids"][:] == expected and found.length == length


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved", "saved dict"])
def test_rows_of_text_from_any_source(tmp_path, make, byte_tokenizer, kind):
    """Empty texts teach nothing and are left out."""
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]})
    source = tmp_path / {"jsonl": "a.jsonl", "parquet": "a.parquet"}.get(kind, "folder")
    if kind == "jsonl":
        source.write_text(rows_of(TEXTS))
    elif kind == "parquet":
        table.to_parquet(source)
    elif kind == "folder":
        source.mkdir()
        (source / "train-0.jsonl").write_text(rows_of(TEXTS[:2]))
        (source / "train-1.jsonl").write_text(rows_of(TEXTS[2:]))
        (source / "test.jsonl").write_text(rows_of(["not to be learnt"]))
    elif kind == "saved":
        table.save_to_disk(source)
    else:
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(source)
    assert_blocks(make(source), ["hi all", "low", "we go"], byte_tokenizer)


def test_a_text_file_is_one_text(tmp_path, make, byte_tokenizer):
    source = tmp_path / "book.txt"
    source.write_text("one\ntwo\n\nthree!\n")
    assert_blocks(make(source), ["one\ntwo\n\nthree!\n"], byte_tokenizer)
    (tmp_path / "folder").mkdir()
    for name, text in (("b.txt", "lower"), ("a.txt", "hi all")):
        (tmp_path / "folder" / name).write_text(text)
    assert_blocks(make(tmp_path / "folder"), ["hi all", "lower"], byte_tokenizer)


def test_the_tokenizer_begins_each_text_its_own_way(tmp_path, space_tokenizer):
    """With BOS in front where it puts one, and one end token behind."""
    source = tmp_path / "a.jsonl"
    source.write_text(rows_of(["a", "b"]))
    one, other = (space_tokenizer(text)["input_ids"] for text in "ab")
    bos, eos = space_tokenizer.bos_token_id, space_tokenizer.eos_token_id
    assert one[0] == other[0] == bos and one[-1] != eos
    ids = [*one, eos, *other, eos]
    cache = str(tmp_path / "cache")
    found = create_text_blocks(str(source), None, space_tokenizer, len(ids), cache)
    assert found.blocks["input_ids"][:] == [ids]


def test_names_of_special_tokens_are_letters_and_counted(tmp_path, make, byte_tokenizer):
    """An end token at a text's end is the one that stands there anyhow."""
    source = tmp_path / "a.jsonl"
    source.write_text(rows_of(["a<eos>b", "low <eos>\n<eos>", "we <pad>", "no"]))
    texts = ("a", "b", "low ", "we ", "no", "<", "eos>", "pad>")
    a, b, low, we, no, less, end, pad = byte_tokenizer([*texts])["input_ids"]
    ids = [*a, *less, *end, *b, EOS, *low, EOS, *we, *less, *pad, EOS, *no, EOS]
    found = make(source, length=len(ids))
    assert found.blocks["input_ids"][:] == [ids] and found.special_names == 2
    (line,) = found.lines()
    assert line.startswith("unsupervised_dataset_name: rows that name special tokens: 2; there ")
    assert make(source, length=len(ids)).special_names == 2  # from the cache
    kept = make(source, keeps=True)
    assert kept.key != found.key and kept.lines() == []
    ids = [i for block in kept.blocks["input_ids"][:] for i in block]
    assert ids[: len(a) + 2] == [*a, EOS, *b] and less[0] not in ids


def test_done_once_and_again_when_anything_changes(tmp_path, make):
    source = tmp_path / "a.jsonl"
    source.write_text(rows_of(TEXTS))
    first = make(source)
    files = sorted((tmp_path / "cache").rglob("*.arrow"))
    stamp = files[0].stat().st_mtime_ns
    assert make(source).key == first.key and files[0].stat().st_mtime_ns == stamp
    assert make(source, length=3).key != first.key
    source.write_text(rows_of([*TEXTS, "more"]))
    assert make(source).key != first.key
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"text": "hi"}\n{"body": "x"}\n',
            "a.jsonl line 2: no text in a column 'text'",
        ),
        ("a.jsonl", '{"text": 3}\n', "line 1: no text in a column 'text' (found: text)"),
        ("a.jsonl", "[1]\n", "line 1: no text in a column 'text' (found: a list)"),
        ("a.jsonl", '{"text": "hi"}\n', "3 tokens, less than one block of 4"),
        ("a.csv", "text\nhi\n", "files of kind '.csv' are not read; give one of .txt, .jsonl"),
    ],
)
def test_bad_text_is_named(tmp_path, make, byte_tokenizer, name, content, words):
    (tmp_path / name).write_text(content)
    if "3 tokens" in words:
        words = words.replace("3", str(len(ids_of(["hi"], byte_tokenizer))), 1)
    with pytest.raises(UserError) as caught:
        make(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "asked", "config", "words"),
    [
        ({}, "gone.jsonl", None, "no such file or folder; check the path"),
        (
            {"a.txt": "x"},
            "a.txt",
            "raw",
            "folder, which has no configuration raw; drop it",
        ),
        ({"d/a.txt": "x", "d/b.jsonl": "{}"}, "d", None, "holds a.txt, b.jsonl: keep files of one"),
        (
            {"d/a.csv": "x"},
            "d",
            None,
            "no train file in this folder; name one train.txt",
        ),
    ],
)
def test_bad_sources_are_named(tmp_path, make, files, asked, config, words):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        make(tmp_path / asked, config=config)
    assert words in str(caught.value)


def test_text_in_another_encoding_is_named(tmp_path, make):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        make(tmp_path / "a.txt")
