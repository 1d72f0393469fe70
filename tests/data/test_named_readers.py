"""The sixteen sets that DeepSpeed-Chat names, on rows of their true columns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest

from dschat.data import sources as raw_datasets
from dschat.data.readers import NAMED, format_by_name
from dschat.data.store import load_source
from dschat.errors import UserError
from dschat.text.conversations import Turn

HH_PROMPT = "\n\nHuman: Is it so?\n\nAssistant: It is.\n\nHuman: Why?\n\nAssistant:"
HH = {"prompt": HH_PROMPT, "response": " So.", "chosen": " So.", "rejected": " No."}
PASSAGES = [
    {"docid": "1#0", "title": "東京", "text": "東京は首都。"},
    {"docid": "1#1", "title": "東京", "text": "都。"},
]
MIRACL = {
    "query_id": "7",
    "query": "首都は?",
    "positive_passages": PASSAGES,
    "negative_passages": [{"docid": "2#0", "title": "京都", "text": "京都は古い。"}],
    "emb": [0.1, 0.2],
}
MKQA = {
    "query": "how long is it",
    "answers": {
        lang: [{"type": "number_with_unit", "entity": "", "text": text, "aliases": [text]}]
        for lang, text in (("en", "3 hours"), ("zh_cn", "3小时"), ("ja", "3 時間"))
    },
    "queries": {"en": "how long is it", "zh_cn": "多长", "ja": "どのくらい"},
    "example_id": 563260143484355911,
}
NO_ANSWER = [{"type": "unanswerable", "entity": "", "text": None, "aliases": []}]
WEBGPT = {
    "question": {"dataset": "eli5", "id": "3a", "full_text": "Why blue?"},
    "quotes_0": {"title": ["t"], "extract": ["e"]},
    "answer_0": "Light [1] scatters (a lot).[2, 3]",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": 0.75,
    "quotes_1": {"title": ["t"], "extract": ["e"]},
    "answer_1": "It is.",
    "tokens_1": {"prefix": [1], "completion": [2]},
    "score_1": -0.75,
}
SHP = {
    "post_id": "x",
    "domain": "askculinary_train",
    "history": "Why salt?",
    "human_ref_A": "Taste.",
    "human_ref_B": "No idea.",
    "labels": 1,
    "score_A": 8,
    "score_B": 2,
}
VICUNA = {
    "prompt": "USER: Hi there ASSISTANT: Hello!</s>USER: Bye ASSISTANT:",
    "label": "Good bye!</s>",
}
ZHIHU = {"INSTRUCTION": "为什么?", "RESPONSE": "因为。", "SOURCE": "Zhihu", "METADATA": "{}"}
HC3 = {
    "id": "0",
    "question": "什么是光?",
    "human_answers": ["光是波。", "不知道"],
    "chatgpt_answers": ["光是一种电磁波。"],
}
JAQUAD = {
    "sentence": "源頼朝は将軍になった。",
    "question": "誰が将軍に?",
    "answer": "源頼朝",
    "paragraph": "源頼朝は将軍になった。その後。",
    "sentence_answer": "<hl>",
    "paragraph_id": "tr-1",
}
JAQUAD_PARAGRAPH = {
    "answers": ["源頼朝", "鎌倉"],
    "questions": ["誰が将軍に?", "どこで?"],
    "paragraph": "源頼朝は将軍になった。",
    "questions_answers": "question: 誰が",
    "paragraph_id": "tr-1",
}
REWARD = {
    "prompt": "\n\nHuman: A tale? \n\n",
    "chosen": "Assistant: Once.",
    "rejected": "Assistant: No. Assistant: is what I am.",
}
SYNTHETIC = {"prompt": "How to boil an egg?", "chosen": "In water.", "rejected": "In oil."}


def _asked(*texts: str) -> tuple[Turn, ...]:
    """User and assistant in turns."""
    return tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


@dataclass(frozen=True)
class Known:
    """A row of a set, and what it means."""

    row: dict[str, Any]
    prompt: str | tuple[Turn, ...]
    chosen: str
    rejected: str | None = None


MIRACL_MEANS = (_asked("首都は?"), "東京は首都。", "京都は古い。")
SETS = {
    "Dahoas/rm-static": Known(HH, HH_PROMPT, " So.", " No."),
    "Dahoas/full-hh-rlhf": Known(HH, HH_PROMPT, " So.", " No."),
    "Dahoas/synthetic-instruct-gptj-pairwise": Known(
        SYNTHETIC, _asked("How to boil an egg?"), "In water.", "In oil."
    ),
    "yitingxie/rlhf-reward-datasets": Known(
        REWARD, "\n\nHuman: A tale?\n\nAssistant:", " Once.", " No. Assistant: is what I am."
    ),
    "openai/webgpt_comparisons": Known(
        WEBGPT, _asked("Why blue?"), "Light scatters (a lot).", "It is."
    ),
    "stanfordnlp/SHP": Known(SHP, _asked("Why salt?"), "Taste.", "No idea."),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": Known(
        VICUNA, _asked("Hi there", "Hello!", "Bye"), "Good bye!"
    ),
    "wangrui6/Zhihu-KOL": Known(ZHIHU, _asked("为什么?"), "因为。"),
    "Cohere/miracl-zh-queries-22-12": Known(MIRACL, *MIRACL_MEANS),
    "Hello-SimpleAI/HC3-Chinese": Known(HC3, _asked("什么是光?"), "光是波。"),
    "mkqa-Chinese": Known(MKQA, _asked("多长"), "3小时"),
    "mkqa-Japanese": Known(MKQA, _asked("どのくらい"), "3 時間"),
    "Cohere/miracl-ja-queries-22-12": Known(MIRACL, *MIRACL_MEANS),
    "lmqg/qg_jaquad": Known(JAQUAD, _asked("誰が将軍に?"), "源頼朝は将軍になった。"),
    "lmqg/qag_jaquad": Known(JAQUAD_PARAGRAPH, _asked("誰が将軍に?"), "源頼朝は将軍になった。"),
    "local/jsonfile": Known(HH, HH_PROMPT, " So.", " No."),
}
# Told by their columns alone; the others' columns mean something else under any other name.
BY_COLUMNS = [
    name for name in SETS if not name.startswith(("mkqa", "local", "yitingxie", "Dahoas/synthetic"))
]


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _means(source: raw_datasets.Source, known: Known) -> None:
    row = source.train[0]
    is_text = isinstance(known.prompt, str)
    assert row["prompt"] == (known.prompt if is_text else None)
    turns = None if is_text else [{"role": t.role, "text": t.text} for t in known.prompt]
    assert row["turns"] == turns
    assert (row["chosen"], row["rejected"], row["whole"]) == (known.chosen, known.rejected, False)


def test_all_of_them_are_registered():
    assert list(NAMED) == list(SETS) and len(SETS) == 16


@pytest.mark.parametrize("name", [name for name in SETS if name != "local/jsonfile"])
def test_from_the_hub_by_name(name, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([SETS[name].row] * 3)
    asked = []

    def load(*args):
        asked.append(args)
        return datasets.DatasetDict(train=rows)

    monkeypatch.setattr(raw_datasets.datasets, "load_dataset", load)
    _means(load_source(name, 1, tmp_path / "cache"), SETS[name])
    expected = {"mkqa": ("apple/mkqa",), "Hello-SimpleAI/HC3": (name, "all")}
    assert asked == [expected.get(name.rpartition("-")[0], (name,))]


@pytest.mark.parametrize("name", SETS)
def test_from_a_folder_of_its_name(name, tmp_path, monkeypatch):
    if name == "local/jsonfile":
        monkeypatch.chdir(tmp_path)
        for part in ("train", "eval"):
            _write(tmp_path / "data" / f"{part}.json", SETS[name].row)
        folder = name
    else:
        folder = str(tmp_path / name)
        _write(Path(folder) / "train.jsonl", *[SETS[name].row] * 3)
    _means(load_source(folder, 1, tmp_path / "cache"), SETS[name])


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_by_its_columns_under_another_name(name, tmp_path):
    file = _write(tmp_path / "mine.jsonl", *[SETS[name].row] * 3)
    _means(load_source(str(file), 1, tmp_path / "cache"), SETS[name])


def test_names_are_found_in_paths():
    for path in (
        "/data/openai/webgpt_comparisons",
        "./webgpt_comparisons/",
        "webgpt_comparisons/train.jsonl",
        "/hub/datasets--openai--webgpt_comparisons/snapshots/abc",
        "/cache/openai___webgpt_comparisons",
    ):
        assert format_by_name(path) is NAMED["openai/webgpt_comparisons"], path
    for path in ("webgpt", "my-SHP", "local", "jsonfile", "/data/jsonfile/train.jsonl"):
        assert format_by_name(path) is None, path


def test_a_name_with_other_columns_is_read_by_its_columns(tmp_path):
    _write(tmp_path / "SHP" / "train.jsonl", *[HH] * 3)
    _means(load_source(str(tmp_path / "SHP"), 1, tmp_path / "cache"), SETS["Dahoas/rm-static"])


def test_a_first_row_without_use_does_not_hide_the_set(tmp_path):
    name, row = "pvduy/sharegpt_alpaca_oa_vicuna_format", VICUNA
    _write(tmp_path / name / "train.jsonl", {**row, "prompt": None}, row, row)
    source = load_source(str(tmp_path / name), 1, tmp_path / "cache")
    _means(source, SETS[name])
    assert source.skipped["train"] == {"no prompt": 1}


def test_mkqa_needs_its_language(tmp_path):
    file = _write(tmp_path / "mine.jsonl", MKQA, MKQA)
    with pytest.raises(UserError, match=r"mine\.jsonl line 1: .*mkqa-Chinese or mkqa-Japanese"):
        load_source(str(file), 1, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("openai/webgpt_comparisons", {"score_1": 0.75}, "tie"),
        ("wangrui6/Zhihu-KOL", {"RESPONSE": None}, "no RESPONSE"),
        ("stanfordnlp/SHP", {"history": ""}, "no history"),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}, "no human_answers.0"),
        ("lmqg/qag_jaquad", {"questions": []}, "no questions.0"),
        (
            "Cohere/miracl-ja-queries-22-12",
            {"negative_passages": []},
            "no negative_passages.0.text",
        ),
        (
            "mkqa-Japanese",
            {"answers": {**MKQA["answers"], "ja": NO_ANSWER}},
            "question without a short answer",
        ),
        (
            "pvduy/sharegpt_alpaca_oa_vicuna_format",
            {"prompt": "USER: Hi ASSISTANT: Hello!"},
            "prompt does not end with a question",
        ),
    ],
)
def test_rows_without_use_are_counted_with_their_reason(name, change, reason, tmp_path):
    row = SETS[name].row
    _write(tmp_path / name / "train.jsonl", row, {**row, **change}, row, {**row, **change})
    _write(tmp_path / name / "test.jsonl", row)
    for _ in range(2):  # read, and read again from what was stored
        source = load_source(str(tmp_path / name), 1, tmp_path / "cache")
        assert (len(source.train), source.skipped) == (2, {"train": {reason: 2}, "test": {}})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("openai/webgpt_comparisons", {"score_0": "high"}, "'score_0' is 'high', needs a number"),
        ("openai/webgpt_comparisons", {"question": "Why?"}, "no column 'question.full_text'"),
        ("stanfordnlp/SHP", {"labels": 2}, "'labels' is 2, needs 0 or 1"),
        ("wangrui6/Zhihu-KOL", {"RESPONSE": 3}, "'RESPONSE' is a number, needs text"),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": "光"}, "no column 'human_answers.0'"),
        ("lmqg/qg_jaquad", {"sentence": ["a"]}, "'sentence' is a list, needs text"),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "Hi"}, "has no 'USER:'"),
        (
            "Dahoas/synthetic-instruct-gptj-pairwise",
            {"chosen": 1},
            "'chosen' is a number, needs text",
        ),
    ],
)
def test_malformed_rows_are_named(name, change, words, tmp_path):
    row = SETS[name].row
    _write(tmp_path / name / "train.jsonl", row, {**row, **change})
    with pytest.raises(UserError) as caught:
        load_source(str(tmp_path / name), 1, tmp_path / "cache")
    assert "train.jsonl line 2: " in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
