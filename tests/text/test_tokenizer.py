import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dschat.errors import UserError
from dschat.text import tokenizer as module
from dschat.text.encoding import encode, encode_answers, tokenizer_fingerprint
from dschat.text.ordinary import as_ordinary
from dschat.text.tokenizer import check_same_tokenizer, load_hf_tokenizer
from tests.text.families import TOKENIZERS, ready, texts

PROMPTS = ["hi", "hi ", "hi:", "hi\n", "hi.\n\n", "", "  hi", "is it so?  "]
ANSWERS = ["we", " we", "we and lo", " and", "\nlo", "\n\n we", " ", "a", ":", "hi.", " a\n"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def family(request):
    return ready(TOKENIZERS[request.param]())


@pytest.fixture(params=["byte_tokenizer", "space_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def _answers(tokenizer, prompts, answers):
    prompt_ids = encode(tokenizer, prompts)
    return prompt_ids, encode_answers(tokenizer, prompts, prompt_ids, answers)


def test_every_boundary_is_exact(any_tokenizer):
    prompts = [p for p in PROMPTS for _ in ANSWERS]
    answers = ANSWERS * len(PROMPTS)
    prompt_ids, answer_ids = _answers(any_tokenizer, prompts, answers)
    eos = any_tokenizer.eos_token_id
    for prompt, answer, head, tail in zip(prompts, answers, prompt_ids, answer_ids, strict=True):
        assert head == any_tokenizer(prompt)["input_ids"]
        assert tail[-1] == eos and eos not in tail[:-1]
        text = any_tokenizer.decode(head + tail, skip_special_tokens=True)
        assert text == prompt + answer, (prompt, answer)


def test_answers_are_what_follows_their_prompts(family):
    """Where an answer begins with the only space between, its ids are the rest of the whole's."""
    prompts, answers = texts(800, seed=1), [f" {text}" for text in texts(800, seed=2)]
    heads, tails = _answers(family, prompts, answers)
    whole = family([p + a for p, a in zip(prompts, answers, strict=True)])["input_ids"]
    met = 0
    for prompt, answer, head, tail, both in zip(prompts, answers, heads, tails, whole, strict=True):
        if prompt and not prompt[-1].isspace() and "</s>" not in answer:
            met += 1
            assert head + tail == [*both, family.eos_token_id], (prompt, answer)
    assert met > 300


def test_marked_and_other_texts_keep_their_places(family):
    some = ["the </s> cat", "a b", "</s>", "isn't", "the</s>the"]
    given = [as_ordinary(family, text) if at % 2 == 0 else text for at, text in enumerate(some)]
    assert encode(family, given) == [encode(family, [text])[0] for text in given]


def test_truncation_of_an_earlier_call_does_not_linger(family):
    text = "never a word that was seen before, nowhere"
    family(text, truncation=True, max_length=3, padding="max_length")
    (ids,) = encode(family, [text])
    assert len(ids) > 3
    assert ids == family(text)["input_ids"]


def test_answer_after_an_open_space_is_not_merged_into_it(byte_tokenizer):
    # "hi" + " we" would be hi·Ġwe; with the space in the prompt, that token straddles the boundary.
    (whole,) = encode(byte_tokenizer, ["hi we"])
    assert byte_tokenizer.convert_ids_to_tokens(whole) == ["hi", "Ġwe"]
    prompts, answers = _answers(byte_tokenizer, ["hi "], ["we"])
    assert byte_tokenizer.convert_ids_to_tokens(prompts[0]) == ["hi", "Ġ"]
    assert byte_tokenizer.convert_ids_to_tokens(answers[0]) == ["w", "e", "<eos>"]


def test_answer_gains_no_space_where_every_text_gets_one(space_tokenizer):
    # "hi " ends in ▁, which "hi and" would merge with what follows; alone, "and" would be ▁and.
    prompts, answers = _answers(space_tokenizer, ["hi "], ["and"])
    assert space_tokenizer.convert_ids_to_tokens(prompts[0]) == ["<s>", "▁", "hi", "▁"]
    assert space_tokenizer.convert_ids_to_tokens(answers[0]) == ["a", "nd", "</s>"]


def test_sentinel_that_the_tokenizer_swallows_is_not_trusted(byte_tokenizer):
    # "\n" + "\n we" loses all leading white space and would leave "we"; ":\n we" keeps it.
    byte_tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=True, right=False)
    _, answers = _answers(byte_tokenizer, ["hi\n"], ["\n we"])
    assert byte_tokenizer.convert_ids_to_tokens(answers[0]) == ["Ċ", "Ġwe", "<eos>"]


def test_end_token_is_there_exactly_once(any_tokenizer):
    eos = any_tokenizer.eos_token
    _, answers = _answers(any_tokenizer, ["hi"] * 4, [" lo", " lo" + eos, " lo" + eos * 2, eos])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].count(any_tokenizer.eos_token_id) == 1
    assert answers[3] == [any_tokenizer.eos_token_id]


def test_own_pad_token_is_kept_and_a_missing_one_is_eos(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path / "own")
    assert load_hf_tokenizer(str(tmp_path / "own")).pad_token == "<pad>"
    byte_tokenizer.pad_token = None
    byte_tokenizer.save_pretrained(tmp_path / "none")
    assert load_hf_tokenizer(str(tmp_path / "none")).pad_token_id == 0


def test_eot_token_becomes_eos_and_is_saved(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path / "base")
    size = len(byte_tokenizer)
    new = load_hf_tokenizer(str(tmp_path / "base"), add_eot_token=True)
    assert (new.eos_token, new.eos_token_id, len(new)) == ("<|endoftext|>", size, size + 1)
    assert new("hi<|endoftext|>")["input_ids"][-1] == size
    new.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.eos_token_id, again.pad_token) == (size, "<pad>")


def test_known_eot_token_keeps_its_id(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    known = load_hf_tokenizer(str(tmp_path), add_eot_token=True, eot_token="<pad>")
    assert (known.eos_token_id, len(known)) == (1, len(byte_tokenizer))


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", "{}"), ("tokenizer.json", '{"mo'), ("tokenizer_config.json", "[1]")],
)
def test_damaged_files_are_one_line(byte_tokenizer, tmp_path, file, text):
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(
        UserError, match=r"tokenizer '.*' does not load \(.+\): give a model"
    ) as caught:
        load_hf_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_end_token_is_refused(byte_tokenizer, tmp_path):
    byte_tokenizer.eos_token = None
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no end token.*--add_eot_token"):
        load_hf_tokenizer(str(tmp_path))
    assert load_hf_tokenizer(str(tmp_path), add_eot_token=True).eos_token == "<|endoftext|>"


def test_tokenizer_that_ends_every_text_is_refused(space_tokenizer, tmp_path):
    space_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    space_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="appends '</s>' to every text"):
        load_hf_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "~/missing-model", "{tmp}/missing", "{tmp}"])
def test_a_path_without_tokenizer_files_never_asks_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AutoTokenizer", None)
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_hf_tokenizer(name.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_hub_name_is_one_line(monkeypatch):
    class Hub:
        @staticmethod
        def from_pretrained(name, **options):
            raise OSError("cannot connect\nsecond line")

    monkeypatch.setattr(module, "AutoTokenizer", Hub)
    with pytest.raises(UserError, match=r"some/model.*\(cannot connect\)") as caught:
        load_hf_tokenizer("some/model")
    assert "\n" not in str(caught.value)


def test_another_cut_of_the_same_vocabulary_is_another_tokenizer(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path / "same")
    check_same_tokenizer(byte_tokenizer, str(tmp_path / "same"))
    content = json.loads((tmp_path / "same/tokenizer.json").read_text())
    byte_tokenizer.save_pretrained(tmp_path / "lower")
    (tmp_path / "lower/tokenizer.json").write_text(
        json.dumps(content | {"normalizer": {"type": "Lowercase"}})
    )
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        check_same_tokenizer(byte_tokenizer, str(tmp_path / "lower"))


def test_fingerprint_sees_the_vocabulary_not_the_last_call(byte_tokenizer):
    before = tokenizer_fingerprint(byte_tokenizer)
    byte_tokenizer(["hi", "hi we"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(byte_tokenizer) == before
    byte_tokenizer.pad_token = "<eos>"
    assert tokenizer_fingerprint(byte_tokenizer) != before


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer"])
def test_a_pattern_that_gives_up_is_one_line(place: str):
    """Rust panics there, which no `except Exception` sees."""
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    endless = Regex("(a+)+$")
    if place == "normalizer":
        inner.normalizer = normalizers.Replace(endless, "x")
    else:
        inner.pre_tokenizer = pre_tokenizers.Split(endless, "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, name_or_path="base")
    with pytest.raises(UserError, match=r"^tokenizer 'base': gives up on a text .*retry-limit"):
        encode(tokenizer, ["a" * 40 + "b"])
