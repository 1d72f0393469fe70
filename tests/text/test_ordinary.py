"""Names of special tokens in a user's text are letters, and the format's own stay tokens."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dschat.errors import UserError
from dschat.text.conversations import Example, Turn
from dschat.text.encoding import encode, encode_answers
from dschat.text.formats import set_format
from dschat.text.ordinary import MARK, as_ordinary, ordinary_examples, without_marks
from tests.helpers.bpe import space_tokenizer
from tests.text.families import TOKENIZERS, ready
from tests.text.templates import FAMILIES, with_template

TEXTS = [
    "the </s> cat",
    "</s>",
    "a</s>b</s></s> <s>it",
    "the\n</s>\ncat isn't </s>",
    " </s> x",
    "<s></s><</s>/s>",
]


@pytest.fixture(scope="module", params=[*TOKENIZERS, "spaces"])
def tokenizer(request):
    return space_tokenizer() if request.param == "spaces" else ready(TOKENIZERS[request.param]())


@pytest.mark.parametrize("special", [True, False])
def test_names_are_letters_and_the_text_stays(tokenizer, special):
    marked = [as_ordinary(tokenizer, text) for text in TEXTS]
    assert all(MARK in text for text in marked) and [*map(without_marks, marked)] == TEXTS
    start = tokenizer("", add_special_tokens=special)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    for text, ids in zip(TEXTS, encode(tokenizer, marked, special), strict=True):
        assert ids[: len(start)] == start and not ends & set(ids[len(start) :])
        if tokenizer.unk_token_id not in ids:
            plain = [i for i in ids if i not in ends]
            whole = tokenizer.decode(plain, clean_up_tokenization_spaces=False)
            if tokenizer.backend_tokenizer.decoder is None:
                whole = whole.replace(" ", "").replace("▁", " ")
            assert whole.strip() == text.strip()


def test_the_text_around_a_token_is_read_as_it_is_without_marks(tokenizer):
    """Marks elsewhere change nothing: a marked letter-free end, and the tokens of a format."""
    parts = ["the cat", " the", "it\n", "a  b "]
    for before in parts:
        for after in parts:
            text = f"{before}</s>{after}"
            (expected,) = encode(tokenizer, [text])
            (ids,) = encode(tokenizer, [text + as_ordinary(tokenizer, " </s>")])
            tail = len(ids) - len(expected)
            assert tail > 0 and tokenizer.eos_token_id in ids
            shared = len(expected) - 2  # the last word may merge with what follows
            assert ids[:shared] == expected[:shared]


def test_an_answer_has_one_end_token_whatever_is_in_it(tokenizer):
    prompts = ["the cat is </s>", "the cat is"]
    texts = [as_ordinary(tokenizer, text) for text in prompts]
    answers = [as_ordinary(tokenizer, text) for text in (" it </s> is", "</s>")]
    heads = encode(tokenizer, texts)
    for head, ids in zip(heads, encode_answers(tokenizer, texts, heads, answers), strict=True):
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 > 0
        assert tokenizer.eos_token_id not in head


@pytest.mark.parametrize("family", ["chatml", "llama-3", "zephyr"])
def test_the_template_keeps_its_tokens(family, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, FAMILIES[family])
    form = set_format(tokenizer)
    end = tokenizer.eos_token
    asked = (Turn("user", f"what is {end}?"), Turn("assistant", f"{end} ends"), Turn("user", "so"))
    (example,), count = ordinary_examples(tokenizer, [Example(asked, f"{end} it is {end}")])
    assert count == 1
    opened = form.prompt(example.prompt)
    plain = form.prompt(tuple(Turn(turn.role, "x") for turn in asked))
    (ids,), (expected,) = (encode(tokenizer, [text], False) for text in (opened, plain))
    special = set(tokenizer.all_special_ids) | {tokenizer.eos_token_id}
    assert [i for i in ids if i in special] == [i for i in expected if i in special]
    answer = form.answer(example.prompt, opened, example.chosen)
    (tail,) = encode_answers(tokenizer, [opened], [ids], [answer], False)
    assert tail.index(tokenizer.eos_token_id) == len(tail) - 1
    assert tokenizer.decode(tail[:-1]).strip() == f"{end} it is"  # its own end is taken off


def test_rows_without_names_are_left_alone(tokenizer):
    rows = [Example("hi </ s>", "we", None), Example((Turn("user", "lo"),), "x </s>  ")]
    marked, count = ordinary_examples(tokenizer, rows)
    assert marked[0] is rows[0] and (marked[1].chosen, count) == ("x ", 0)


def whole_words(**more) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **more)


def test_a_model_of_whole_words_knows_no_letters():
    tokenizer = whole_words(unk_token="<unk>")
    assert encode(tokenizer, [as_ordinary(tokenizer, "a </s> a"), "a </s> a"]) == [
        [2, 0, 2],
        [2, 1, 2],
    ]
    with pytest.raises(UserError, match="cannot write '</s>' but as its special token"):
        tokenizer = whole_words()
        encode(tokenizer, [as_ordinary(tokenizer, "a </s> a")])
