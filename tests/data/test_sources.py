import json
import pickle
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dschat.data import parquet
from dschat.data.store import load_source
from dschat.errors import UserError
from tests.helpers.doors import Payload, code_of, mark

PAIR = {"prompt": "hi", "chosen": " we", "rejected": " lo"}
ROWS = [{**PAIR, "prompt": f"hi {number}"} for number in range(20)]


def _load(name, tmp_path, seed=1):
    return load_source(str(name), seed, tmp_path / "cache")


def _prompts(rows):
    return list(rows["prompt"])


def _error(name, tmp_path):
    with pytest.raises(UserError) as caught:
        _load(name, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path.name}/")


def test_all_file_kinds_give_the_same_rows(write_rows, tmp_path):
    lines = write_rows(ROWS, "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    write_rows(ROWS, "b.json")  # JSON Lines under the other name
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    expected = _load(lines, tmp_path)
    assert (len(expected.train), len(expected.test)) == (18, 2)
    assert sorted(_prompts(expected.train) + _prompts(expected.test)) == sorted(
        row["prompt"] for row in ROWS
    )
    for name in ("a.json", "b.json", "a.parquet", "saved"):
        source = _load(tmp_path / name, tmp_path)
        for split in ("train", "test"):
            mine, theirs = getattr(source, split), getattr(expected, split)
            for column in ("prompt", "chosen", "rejected"):
                assert mine[column][:] == theirs[column][:], (name, split, column)


def test_holdout_depends_on_the_seed_alone(write_rows, tmp_path):
    name = write_rows(ROWS)
    first, again, other = (_load(name, tmp_path, seed) for seed in (1, 1, 2))
    assert _prompts(first.test) == _prompts(again.test) != _prompts(other.test)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(_load(write_rows(ROWS[:2]), tmp_path).test) == 1


@pytest.mark.parametrize("test_name", ["test", "eval", "validation", "dev"])
def test_folder_with_its_own_test_set(test_name, write_rows, tmp_path):
    write_rows(ROWS[:5], "set/train.jsonl")
    write_rows(ROWS[5:8], f"set/{test_name}.jsonl")
    source = _load(tmp_path / "set", tmp_path)
    assert _prompts(source.train) == [row["prompt"] for row in ROWS[:5]]
    assert _prompts(source.test) == [row["prompt"] for row in ROWS[5:8]]


def test_folder_of_shards_without_a_test_set(write_rows, tmp_path):
    write_rows(ROWS[:10], "set/train-00000.jsonl")
    write_rows(ROWS[10:], "set/train-00001.jsonl")
    source = _load(tmp_path / "set", tmp_path)
    assert (len(source.train), len(source.test)) == (18, 2)


def test_saved_dataset_dict(tmp_path):
    sets = {"train": ROWS[:4], "validation": ROWS[4:6]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in sets.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    source = _load(tmp_path / "saved", tmp_path)
    assert (_prompts(source.train)[0], len(source.train), len(source.test)) == ("hi 0", 4, 2)


def test_local_jsonfile_reads_the_current_folder(write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(ROWS[:3], "data/train.json")
    write_rows(ROWS[3:5], "data/eval.json")
    source = _load("local/jsonfile", tmp_path)
    assert (len(source.train), len(source.test)) == (3, 2)


def test_local_jsonfile_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train.json and eval.json" in _error("local/jsonfile", tmp_path)


def test_response_stands_for_chosen_and_absent_columns_are_null(write_rows, tmp_path):
    rows = [{"prompt": "a", "response": "r"}, {"prompt": "b", "response": "r", "chosen": "c"}]
    source = _load(
        write_rows([*rows, *rows], "set/train.jsonl").removesuffix("/train.jsonl"), tmp_path
    )
    both = source.train.to_list() + source.test.to_list()
    assert {row["prompt"]: row["chosen"] for row in both} == {"a": "r", "b": "c"}
    assert {row["rejected"] for row in both} == {None}


def test_hub_set_goes_through_the_same_door(tmp_path, monkeypatch):
    sets = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:3]), test=datasets.Dataset.from_list(ROWS[3:])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: sets)
    source = _load("owner/name", tmp_path)
    assert source.train[0]["place"] == "owner/name train row 1"
    assert (len(source.train), len(source.test)) == (3, 17)


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    def refuse(name):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "owner/name" in _error("owner/name", tmp_path)


def test_edited_file_is_another_source(write_rows, tmp_path):
    before = _load(write_rows(ROWS), tmp_path)
    after = _load(write_rows([{**ROWS[0], "prompt": "new"}, *ROWS[1:]]), tmp_path)
    assert before.fingerprint != after.fingerprint
    assert "new" in _prompts(after.train) + _prompts(after.test)


def test_a_failed_read_leaves_nothing_behind(write_rows, tmp_path):
    _error(write_rows([PAIR, {"prompt": 3}]), tmp_path)
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": 3}, "column 'chosen' is a number, needs text"),
        ({"prompt": None, "chosen": "a"}, "column 'prompt' is missing or null, needs text"),
        ({"prompt": ["a"], "chosen": "a"}, "column 'prompt', message 1: needs an object with"),
        ({"prompt": {"a": 1}, "chosen": "a"}, "column 'prompt' is an object, needs text"),
        ({"question": "a"}, "no column 'prompt' (columns: question)"),
        ({"prompt": "\ud800"}, "column 'prompt' holds half a surrogate pair"),
        (["prompt", "a"], "is a list, needs an object"),
    ],
)
def test_bad_row_is_named_by_file_line_and_column(row, words, write_rows, tmp_path):
    message = _error(write_rows([PAIR, row], "rows.jsonl"), tmp_path)
    assert message.startswith("rows.jsonl line 2: ") and words in message


def test_a_file_is_named_with_its_folder(write_rows, tmp_path):
    assert (
        _load(write_rows(ROWS, "one/a.jsonl"), tmp_path)
        .test[0]["place"]
        .startswith("one/a.jsonl line ")
    )


def test_malformed_json_is_named_by_line(tmp_path):
    good = json.dumps(PAIR)
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{{'prompt'\n")
    assert _error(tmp_path / "a.jsonl", tmp_path).startswith("a.jsonl line 3: not JSON")
    (tmp_path / "a.json").write_text(f"[\n{good},\n{good}\n{good}]")
    assert _error(tmp_path / "a.json", tmp_path).startswith("a.json line 4: not JSON")
    (tmp_path / "b.jsonl").write_bytes(good.encode() + b'\n{"prompt": "\xff"}\n')
    assert _error(tmp_path / "b.jsonl", tmp_path).startswith("b.jsonl line 2: not UTF-8")


def test_wrong_row_of_a_list_and_of_parquet_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([PAIR, {"prompt": 1}]))
    assert _error(tmp_path / "a.json", tmp_path).startswith(
        "a.json row 2: column 'prompt' is a number"
    )
    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": [1, 2]}), tmp_path / "a.parquet")
    message = _error(tmp_path / "a.parquet", tmp_path)
    assert message.startswith("a.parquet row 1: column 'chosen' is a number")
    (tmp_path / "b.parquet").write_text("nothing")
    assert "not a readable parquet file" in _error(tmp_path / "b.parquet", tmp_path)


def test_bad_places_are_named(write_rows, tmp_path):
    assert "no such file" in _error(tmp_path / "missing.jsonl", tmp_path)
    assert "no such file" in _error("./missing", tmp_path)
    (tmp_path / "a.csv").write_text("prompt\nhi\n")
    assert "'.csv' are not read" in _error(tmp_path / "a.csv", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl: holds no rows" in _error(tmp_path / "empty.jsonl", tmp_path)
    assert "has 1 row and no test set" in _error(write_rows([PAIR]), tmp_path)
    (tmp_path / "folder").mkdir()
    assert "no train file" in _error(tmp_path / "folder", tmp_path)
    write_rows([PAIR], "mixed/train.jsonl")
    write_rows([PAIR], "mixed/train.json")
    assert "train.json, train.jsonl: keep files of one kind" in _error(tmp_path / "mixed", tmp_path)


def test_torn_saved_folder_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("data-*.arrow")).unlink()
    assert "not a complete `datasets` folder" in _error(tmp_path / "saved", tmp_path)


def test_place_that_cannot_be_written(write_rows, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert "give another data_output_path" in _error(write_rows(ROWS), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.jsonl",
            '{G}\n{"prompt": "a", "chosen": "b", "prompt": "c"}\n',
            "line 2: the key 'prompt'",
        ),
        (
            "a.jsonl",
            '{G}\n{"prompt": [{"role": "user", "role": "user"}]}\n',
            "line 2: the key 'role'",
        ),
        ("a.json", '[\n{G},\n {G},\n{"prompt": "a", "prompt": "b"}]\n', "line 4: the key 'prompt'"),
        ("a.jsonl", '{G}\n{"prompt": "a", "cho\n', "line 2: not JSON"),
        ("a.jsonl", '{G}\n{"prompt": "a",\n', "line 2: not JSON"),
        ("a.jsonl", '{G}\n{"prompt": "a",', "line 2: not JSON"),
        ("a.json", '[\n{G},\n{"prompt": "a",\n\n', "line 3: not JSON"),
        ("a.jsonl", "{G}\n" + 100_000 * "[" + "\n", "line 2: cannot be read"),
        ("a.jsonl", '{G}\n{"prompt": ' + 5000 * "1" + "}\n", "line 2: cannot be read"),
        ("a.jsonl", '{G}\n{"prompt": NaN}\n', "line 2: column 'prompt' is a number, needs text"),
        ("a.jsonl", '{G}\n{"prompt": true}\n', "line 2: column 'prompt' is true or false"),
        ("a.jsonl", "{G}\nnull\n", "line 2: is missing or null, needs an object"),
        ("a.jsonl", '{G}\n{"prompt": "a", "chosen": [["b"]]}\n', "'chosen', message 1: needs"),
        ("a.jsonl", '{G}\n{"prompt": "a", "chosen": ["b", ["c"]]}\n', "'chosen', message 1: needs"),
    ],
)
def test_what_json_allows_and_rows_do_not(name, text, words, tmp_path):
    (tmp_path / name).write_text(text.replace("{G}", json.dumps(PAIR)))
    assert words in _error(tmp_path / name, tmp_path)


def test_rows_of_another_shape_than_the_first_are_named(write_rows, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    name = write_rows([talk, talk, PAIR])
    message = _error(name, tmp_path)
    assert "train.jsonl line 3: column 'messages' is missing or null" in message


@pytest.mark.parametrize("score", ["nan", "inf", float("nan"), "1e999", None])
def test_scores_are_finite_numbers(score, write_rows, tmp_path):
    good = {"instruction": "a", "completions": [{"response": "b", "score": 1}] * 2}
    bad = [{"response": "b", "score": 1}, {"response": "c", "score": score}]
    name = write_rows([good, {"instruction": "a", "completions": bad}])
    if score is None:  # an answer without a score does not count
        assert "fewer than two scored" in _error(name, tmp_path)
    else:
        assert "needs a number" in _error(name, tmp_path)


def test_a_parquet_file_that_unpacks_without_end_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["hi"] * 10**6}), file, compression="zstd")
    monkeypatch.setattr(parquet, "GROWTH", 20)
    monkeypatch.setattr(parquet, "MANY", 10**5)
    assert re.match(
        r"a.parquet: says 1,000,000 rows in [\d,]+ bytes; write", _error(file, tmp_path)
    )
    text = pa.table({"prompt": ["x" * 10**7]})
    pq.write_table(text, file, compression="zstd", use_dictionary=False, write_statistics=False)
    monkeypatch.setattr(parquet, "MANY_BYTES", 10**6)
    found = r"a.parquet: column 'prompt' unpacks [\d,]+ bytes to 10,000,\d+; write it again"
    assert re.match(found, _error(file, tmp_path))


@pytest.mark.parametrize("name", ["pandas", "json", "webdataset"])
def test_no_reader_of_what_lies_here_is_taken_for_a_set(tmp_path, monkeypatch, name):
    """`datasets` would read the current folder; older versions pickles as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Payload(code_of(tmp_path))))
    assert "names no set; give a file, a folder or a hub id" in _error(name, tmp_path / "cache")
    assert not mark(tmp_path).exists()


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_damaged_bytes_are_laid_to_the_file_that_has_them(kind, tmp_path):
    """Every byte of a file in turn is another one: rows are read, or the file is named."""
    if kind == "parquet":
        path = name = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        name = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(name))
        (path,) = name.glob("data-*.arrow")
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            _load(name, tmp_path)
        except UserError as error:
            refused += 1
            assert name.name in str(error) and "\n" not in str(error)
            assert "data_output_path" not in str(error)
    assert refused > 5


def test_a_parquet_file_that_says_less_than_it_holds_is_one_line(tmp_path, monkeypatch):
    """One text that stands for every row is said, and packed, once; nothing may take any space."""
    file, count = tmp_path / "a.parquet", 200
    text = pa.DictionaryArray.from_arrays(pa.array([0] * count), ["x" * 4 * 10**6])
    pq.write_table(pa.table({"prompt": text}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 10**4
    monkeypatch.setattr(parquet, "ROWS_BYTES", 1e8)
    assert _error(file, tmp_path) == (
        "a.parquet: 64 rows after row 0 take more than 0.1 GB of memory; write it again"
    )
    nothing = pa.ListArray.from_arrays([0, 10**6], pa.nulls(10**6, pa.int8()))
    pq.write_table(pa.table({"prompt": nothing}), file, compression="zstd")
    monkeypatch.setattr(parquet, "MANY", 10**5)
    found = r"a.parquet: column 'prompt.list.element' says 1,000,000 values in \d+ bytes; write it"
    assert re.match(found, _error(file, tmp_path))
