"""Rows of every shape: training reads the prompt that chat sends, in every prompt format."""

import pytest

from dschat.chat.bot import Chatbot
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from dschat.text.formats import set_format
from dschat.text.tokenizer import load_hf_tokenizer
from tests.data.spec import Spec
from tests.helpers.tiers import tiers
from tests.helpers.tiny import tiny_llama
from tests.text.templates import FAMILIES, with_template

ASKED, ANSWER, WORSE = "what is </s> or <eos>, hi?", "we know", "no"
EARLIER = ("hi lo", "and so")  # a question and its answer before
TALK = [
    {"role": "user", "content": EARLIER[0]},
    {"role": "assistant", "content": EARLIER[1]},
    {"role": "user", "content": ASKED},
]
LAST = {"role": "assistant", "content": ANSWER}
OPENED = f"\n\nHuman: {ASKED}\n\nAssistant:"
LONG = f"\n\nHuman: {EARLIER[0]}\n\nAssistant: {EARLIER[1]}{OPENED}"
# Rows, and whether they hold the earlier turns. Transcripts have answers that begin with a space.
SHAPES = {
    "texts": ({"prompt": ASKED, "chosen": ANSWER, "rejected": WORSE}, False),
    "a prompt alone": ({"prompt": ASKED}, False),
    "prompt and response": ({"prompt": ASKED, "response": ANSWER}, False),
    "Alpaca": ({"instruction": ASKED, "input": "", "output": ANSWER}, False),
    "messages": ({"messages": [*TALK, LAST]}, True),
    "one message": ({"messages": [TALK[-1], LAST]}, False),
    "conversations": (
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                for m in (*TALK, LAST)
            ]
        },
        True,
    ),
    "a prompt of messages": ({"prompt": TALK, "chosen": [LAST], "rejected": WORSE}, True),
    "a marked prompt": ({"prompt": OPENED, "chosen": f" {ANSWER}", "rejected": f" {WORSE}"}, False),
    "a marked prompt, not opened": ({"prompt": OPENED.removesuffix("\n\nAssistant:")}, False),
    "whole transcripts": ({"chosen": f"{LONG} {ANSWER}", "rejected": f"{LONG} {WORSE}"}, True),
}
PHASES = {1: "input_ids", 2: "chosen_ids", 3: "prompt_ids"}


def sent(tokenizer, has_earlier: bool, monkeypatch) -> list[int]:
    """Ids that chat hands to the model for the question."""
    chatbot = Chatbot(tiny_llama(max_position_embeddings=1024), tokenizer, ChatSettings(path="x"))
    heard = []

    def generate(ids, stop, show):
        heard.append(ids)
        return EARLIER[1]

    monkeypatch.setattr(chatbot, "_generate", generate)
    for text in (EARLIER[0], ASKED) if has_earlier else (ASKED,):
        chatbot.ask(text, lambda piece: None)
    return heard[-1]


# Raw writes no turns.
CELLS = [
    f"{kind}: {shape}"
    for kind in ("dschat", "chatml", "llama-3", "raw")
    for shape, (_, has_earlier) in SHAPES.items()
    if kind != "raw" or not (has_earlier or "marked" in shape)
]
CORE = {"dschat: texts", "dschat: messages", "dschat: whole transcripts", "chatml: texts"}


@pytest.mark.parametrize("cell", tiers(CELLS, {*CORE, "raw: texts", "llama-3: messages"}))
def test_training_and_chat_see_one_prompt(cell, byte_tokenizer, write_rows, tmp_path, monkeypatch):
    kind, _, shape = cell.partition(": ")
    row, has_earlier = SHAPES[shape]
    tokenizer = byte_tokenizer
    if kind in FAMILIES:
        tokenizer = with_template(byte_tokenizer, FAMILIES[kind])
    set_format(tokenizer, None if kind in FAMILIES else kind)
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows([row] * 2, "set/train.jsonl")
    write_rows([row], "set/test.jsonl")
    out = str(tmp_path / "out")
    spec = Spec(
        data_path=(str(tmp_path / "set"),),
        data_output_path=out,
        max_seq_len=512,
        max_prompt_len=400,
    )
    # What chat finds in the folder that training has written.
    expected = sent(load_hf_tokenizer(str(tmp_path / "model")), has_earlier, monkeypatch)
    for phase, column in PHASES.items():
        try:
            data = spec.make(tokenizer, phase)
        except UserError as error:
            assert "has no '" in str(error) and phase < 3, error
            continue
        found = data.train[0]
        if phase == 1 and len(found["trained"]) > 2:  # no end tokens within the prompt
            found = spec.but(train_on="last_turn").make(tokenizer, 1).train[0]
        prompt = found[column][: found["prompt_len"]] if phase < 3 else found[column]
        assert prompt == expected, (phase, tokenizer.decode(prompt), tokenizer.decode(expected))
        assert data.report.sources[0].special_names == 2


def test_a_conversation_is_refused_where_no_turns_are_written(byte_tokenizer, write_rows, tmp_path):
    set_format(byte_tokenizer, "raw")
    rows = write_rows([{"messages": [*TALK, LAST]}] * 4)
    spec = Spec(data_path=(rows,), data_output_path=str(tmp_path / "out"), max_seq_len=64)
    with pytest.raises(UserError, match=r"line 1: prompt_format raw writes no turns.* of 3"):
        spec.make(byte_tokenizer, 1)


def test_an_empty_prompt_is_refused(byte_tokenizer, write_rows, tmp_path):
    set_format(byte_tokenizer)
    rows = write_rows([{"prompt": " ", "chosen": "a", "rejected": "b"}] * 4)
    spec = Spec(data_path=(rows,), data_output_path=str(tmp_path / "out"), max_seq_len=64)
    with pytest.raises(UserError, match=r"line \d: the prompt is empty; fix or drop the row"):
        spec.make(byte_tokenizer, 2)
    set_format(byte_tokenizer, "raw", teaches=True)
    assert len(spec.make(byte_tokenizer, 2).train) == 3
