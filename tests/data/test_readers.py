"""Rows known by their columns: what each shape means, and every way to be malformed."""

import pytest

from dschat.errors import UserError
from dschat.text.conversations import Turn, as_turns, parse_transcript
from tests.data.meanings import meaning

ASK, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "we"}
BACK, GOOD, BAD = (
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "lo"},
    {"role": "assistant", "content": "no"},
)
SYSTEM = {"role": "system", "content": "be kind"}
ASKED = (("user", "hi"),)
LONGER = (("user", "hi"), ("assistant", "we"), ("user", "so"))
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: we\n\nHuman: so\n\nAssistant:"


FORMATS = {
    "prompt alone": ({"prompt": "Once"}, ("Once", None, None, False)),
    "prompt alone with a label": ({"prompt": "Once", "label": 1}, ("Once", None, None, False)),
    "prompt and completion": (
        {"prompt": "Once", "completion": " upon"},
        ("Once", " upon", None, False),
    ),
    "keys and tools that say nothing": (
        {
            "prompt": [ASK],
            "chosen": [GOOD | {"tool_calls": None, "thinking": "", "weight": 1.0, "name": "b"}],
            "tools": [],
        },
        (ASKED, "lo", None, False),
    ),
    "prompt as messages": ({"prompt": [ASK]}, (ASKED, None, None, False)),
    "explicit prompt, answers as text": (
        {"prompt": [ASK, REPLY, BACK], "chosen": "lo", "rejected": "no"},
        (LONGER, "lo", "no", False),
    ),
    "explicit prompt, answers as messages": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        (ASKED, "lo", "no", False),
    ),
    "explicit prompt, repeated in the answers": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        (ASKED, "lo", "no", False),
    ),
    "prompt as text, answers as single messages": (
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        (ASKED, "lo", "no", False),
    ),
    "implicit prompt": (
        {"chosen": [ASK, REPLY, BACK, GOOD], "rejected": [ASK, REPLY, BACK, BAD]},
        (LONGER, "lo", "no", False),
    ),
    "implicit prompt with a system turn": (
        {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        ((("system", "be kind"), *ASKED), "lo", "no", False),
    ),
    "the same answer twice": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]},
        (ASKED, "lo", "lo", False),
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": "hi",
            "prompt_id": "0",
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "messages": [ASK, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        (ASKED, "lo", "no", False),
    ),
    "UltraFeedback, all completions": (
        {
            "source": "x",
            "instruction": "hi",
            "models": ["a", "b", "c"],
            "completions": [
                {"model": "a", "response": "lo", "fine-grained_score": 4.5, "overall_score": 1.0},
                {"model": "b", "response": "no", "fine-grained_score": 1.0, "overall_score": 9.0},
                {"model": "c", "response": "so", "fine-grained_score": 2.0, "overall_score": 5.0},
            ],
        },
        (ASKED, "lo", "no", False),
    ),
    "HH transcripts": (
        {"chosen": TRANSCRIPT + " lo, we", "rejected": TRANSCRIPT + " lo, no"},
        (TRANSCRIPT, " lo, we", " lo, no", False),
    ),
    "GSM8K": (
        {"question": "hi", "answer": "so\n#### 4"},
        (ASKED, "so\n#### 4", None, False),
    ),
    "question and a number": (
        {"question": "hi", "answer": 4, "level": "easy"},
        (ASKED, "4", None, False),
    ),
    "prompt beside question and answer": (
        {"prompt": "Once", "question": "hi", "answer": "so"},
        ("Once", None, None, False),
    ),
    "messages": (
        {"messages": [SYSTEM, ASK, REPLY, BACK, GOOD]},
        ((("system", "be kind"), *LONGER), "lo", None, True),
    ),
    "UltraChat": (
        {"prompt": "hi", "prompt_id": "0", "messages": [ASK, REPLY]},
        (ASKED, "we", None, True),
    ),
    "messages without an answer": ({"messages": [ASK]}, (ASKED, None, None, False)),
    "ShareGPT": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "we"},
                {"from": "human", "value": "so"},
                {"from": "gpt", "value": "lo"},
            ],
        },
        (LONGER, "lo", None, True),
    ),
    "conversations with roles": ({"conversations": [ASK, REPLY]}, (ASKED, "we", None, True)),
    "Alpaca": (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        ((("user", "Add\n\n1, 2"),), "3", None, False),
    ),
    "Alpaca without input": (
        {"instruction": "hi", "input": "", "output": "we", "text": "Below is"},
        (ASKED, "we", None, False),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_known_by_their_columns(name, load):
    row, means = FORMATS[name]
    assert meaning(load(row).train[0]) == means


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK, REPLY, BACK]}, "conversation ends without an answer"),
        ({"chosen": [ASK, GOOD], "rejected": [BACK, BAD]}, "the two sides differ before the"),
        ({"chosen": [ASK, GOOD, BACK, BAD], "rejected": [ASK, REPLY]}, "the two sides differ"),
        (
            {"chosen": TRANSCRIPT + " a\n\nHuman: b\n\nAssistant: c", "rejected": TRANSCRIPT},
            "the two sides differ before the last answer",
        ),
        (
            {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 5, "score_rejected": 5},
            "tie",
        ),
        (
            {"instruction": "a", "completions": [{"response": x, "score": 1} for x in "bc"]},
            "tie",
        ),
        (
            {"instruction": "a", "completions": [{"response": "b", "score": 1}]},
            "fewer than two scored completions",
        ),
    ],
)
def test_sound_rows_without_use_are_counted(row, reason, load):
    with pytest.raises(UserError, match=rf"none of its rows is of use \(2 {reason}"):
        load(row, row)


def test_counts_reach_the_report(load, byte_tokenizer, tmp_path):
    from tests.data.spec import Spec

    good = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    load(good, {"chosen": [ASK, GOOD], "rejected": [BACK, BAD]})
    spec = Spec(
        data_path=(str(tmp_path / "set"),),
        data_split="1",
        data_output_path=str(tmp_path / "out"),
        max_seq_len=64,
    )
    report = spec.make(byte_tokenizer, 2).report
    reason = "1 unusable: the two sides differ before the last answer"
    assert report.lines()[0].endswith(f" train: 1 of 2 rows ({reason})")
    assert report == spec.make(byte_tokenizer, 2).report


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "column 'messages' holds no messages"),
        ({"messages": "hi"}, "column 'messages' is text, needs a list of messages"),
        ({"messages": None}, "column 'messages' is missing or null, needs a list"),
        ({"messages": [ASK, ASK]}, "message 2: is from user where assistant should speak"),
        ({"messages": [REPLY, ASK]}, "message 1: is from assistant where user should speak"),
        ({"messages": [ASK, REPLY, SYSTEM]}, "message 3: is from system where user should"),
        ({"messages": [SYSTEM]}, "a system message alone"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1: role 'tool' is unknown"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role ['user'] is unknown"),
        (
            {"messages": [ASK, {"role": "assistant", "content": None}]},
            "is missing or null, needs text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: 'content' is a list, needs text",
        ),
        (
            {"messages": [ASK, REPLY | {"tool_calls": [{"function": {"name": "f"}}]}]},
            "message 2: 'tool_calls' is [{'function': {'name': 'f'}}], which no prompt format",
        ),
        ({"prompt": [ASK], "chosen": [GOOD | {"thinking": "hm"}]}, "'thinking' is 'hm', which"),
        ({"messages": [ASK, REPLY | {"weight": 0}]}, "message 2: 'weight' is 0, which no prompt"),
        *(
            (row | {"tools": [{"type": "function"}]}, "column 'tools' is shown to the model by no")
            for row in (
                {"messages": [ASK, REPLY]},
                {"conversations": [ASK, REPLY]},
                {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
                {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            )
        ),
        ({"messages": ["hi"]}, "message 1: needs an object with the keys 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"conversations": [{"from": "human"}]}, "the keys 'from' and 'value'"),
        ({"prompt": [ASK, REPLY], "chosen": "lo"}, "does not end with the user's turn"),
        ({"prompt": [ASK], "chosen": [ASK, BACK]}, "needs one answer of the assistant"),
        ({"prompt": [ASK], "chosen": [BACK, GOOD]}, "holds 2 messages after the prompt"),
        ({"prompt": "hi", "chosen": "a", "rejected": [BAD]}, "'rejected' is a list, needs text"),
        ({"chosen": [ASK, GOOD], "rejected": "no"}, "column 'rejected' is text, needs a list"),
        ({"chosen": "a", "rejected": "b"}, "share no '\\n\\nAssistant:' after which they part"),
        ({"chosen": TRANSCRIPT, "rejected": 3}, "column 'rejected' is a number, needs text"),
        ({"instruction": 3, "output": "a"}, "column 'instruction' is a number, needs text"),
        ({"instruction": "a", "input": 3, "output": "a"}, "column 'input' is a number, needs text"),
        ({"instruction": "a", "completions": ["b"]}, "'completions' needs a list of objects"),
        (
            {"instruction": "a", "completions": [{"response": "b", "score": "top"}]},
            "column 'score' is 'top', needs a number",
        ),
        (
            {"messages": [ASK, REPLY], "conversations": [ASK, REPLY]},
            "the columns (messages, conversations) can be read in several ways",
        ),
        ({"prompt": "a", "response": "b", "messages": [ASK]}, "can be read in several ways"),
        ({"text": "a", "title": "b"}, "no column 'prompt' (columns: text, title); rename"),
        ({}, "no column 'prompt' (columns: none)"),
    ],
)
def test_malformed_rows_are_named(row, words, load):
    with pytest.raises(UserError) as caught:
        load(row)
    message = str(caught.value)
    assert message.startswith("set/train.jsonl line 1: ") and words in message
    assert "\n" not in message


def test_transcripts_are_parsed():
    assert parse_transcript("Be kind.\n\nHuman: a \n\nAssistant:\n\nHuman: b\n\nAssistant: c") == (
        Turn("system", "Be kind."),
        Turn("user", "a\n\nb"),
        Turn("assistant", "c"),
    )
    assert as_turns("Human: a\n\nAssistant:") == (Turn("user", "a"),)
    # The words alone make no transcript.
    assert as_turns(" The Human: a story ") == (Turn("user", "The Human: a story"),)
