"""What trains, to the token: answers and their end tokens, in every format and template."""

import pytest

from dschat.errors import UserError
from dschat.text.formats import set_format
from tests.data.spec import Spec
from tests.text.templates import COUNTING, ENDLESS, FAMILIES, THINKING, with_template

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "we and lo"},
    {"role": "user", "content": "and so"},
    {"role": "assistant", "content": "a word"},
]
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.fixture(params=["byte_tokenizer", "space_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def rows_of(write_rows, tmp_path):
    """Token rows of a phase from text rows, two of the same on either side."""

    def make(row, tokenizer, phase=1, **more):
        write_rows([row, row], "set/train.jsonl")
        write_rows([row], "set/test.jsonl")
        options = {"max_seq_len": 512, "max_prompt_len": 512, **more}
        spec = Spec(
            data_path=(str(tmp_path / "set"),),
            data_split="1",
            data_output_path=str(tmp_path / "out"),
            seed=1,
            **options,
        )
        set_format(tokenizer)
        return spec.make(tokenizer, phase)

    return make


def _spans(row):
    return list(zip(row["trained"][::2], row["trained"][1::2], strict=True))


def _trained(row, tokenizer):
    return [tokenizer.decode(row["input_ids"][a:b]).strip() for a, b in _spans(row)]


# Two line breaks in front of a word are two tokens, but one at the end of a prompt, which is what
# generation sees: the one text of prompt and answer would be tokenised otherwise.
MERGING = {("byte_tokenizer", "llama-3")}


@pytest.mark.parametrize("has_system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
def test_each_answer_and_its_end_train_and_nothing_else(kind, name, has_system, request, rows_of):
    family = FAMILIES[name]
    tokenizer = with_template(request.getfixturevalue(kind), family)
    talk = [SYSTEM, *TALK] if has_system else TALK
    row = rows_of({"messages": talk}, tokenizer).train[0]
    ids, spans = row["input_ids"], _spans(row)
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert tokenizer.eos_token_id == end
    # The whole is the template's own text up to the last end, tokenised once and in one piece.
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = whole[: len(whole) - whole[::-1].index(end)]
    assert (ids == whole) == ((kind, name) not in MERGING)
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    trained = [tokenizer.decode(ids[a:b]).replace(" ", "") for a, b in spans]
    assert trained == [f"weandlo{family.end}", f"aword{family.end}"]
    assert all(ids[b - 1] == end and end not in ids[a : b - 1] for a, b in spans)
    assert row["prompt_len"] == spans[-1][0] and row["length"] == spans[-1][1] == len(ids)
    # What generation is given ends where the span begins.
    prompt = tokenizer.apply_chat_template(
        talk[: 1 + has_system], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids[: spans[0][0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_phases_write_the_same_prompt(name, any_tokenizer, rows_of):
    tokenizer = with_template(any_tokenizer, FAMILIES[name])
    row = {"prompt": TALK[:3], "chosen": "a word", "rejected": "lo"}
    sft, pair, prompt = (rows_of(row, tokenizer, phase).train[0] for phase in (1, 2, 3))
    begin = prompt["prompt_ids"]
    assert sft["input_ids"] == pair["chosen_ids"]
    assert begin == sft["input_ids"][: sft["prompt_len"]]
    assert begin == pair["rejected_ids"][: pair["prompt_len"]]
    assert begin.count(tokenizer.bos_token_id) == {"llama-2": 2, "llama-3": 1}.get(name, 0)
    # A row of preferences trains its one answer: what came before is context.
    assert sft["trained"] == [len(begin), len(sft["input_ids"])]


def test_dschat_ends_each_answer_that_trains(byte_tokenizer, rows_of):
    row = rows_of({"messages": [SYSTEM, *TALK]}, byte_tokenizer).train[0]
    assert byte_tokenizer.decode(row["input_ids"]) == (
        "be kind\n\nHuman: hi\n\nAssistant: we and lo<eos>"
        "\n\nHuman: and so\n\nAssistant: a word<eos>"
    )
    assert _trained(row, byte_tokenizer) == ["we and lo<eos>", "a word<eos>"]
    last = rows_of({"messages": TALK}, byte_tokenizer, train_on="last_turn").train[0]
    assert _trained(last, byte_tokenizer) == ["a word<eos>"]
    assert last["input_ids"].count(byte_tokenizer.eos_token_id) == 1


def test_transcripts_train_their_earlier_answers_when_asked(byte_tokenizer, rows_of):
    prompt = "\n\nHuman: hi\n\nAssistant: we\n\nHuman: lo\n\nAssistant:"
    row = {"prompt": prompt, "chosen": " and", "rejected": " so"}
    plain = rows_of(row, byte_tokenizer).train[0]
    assert _trained(plain, byte_tokenizer) == ["and<eos>"]
    assert byte_tokenizer.decode(plain["input_ids"]) == prompt + " and<eos>"
    whole = rows_of(row, byte_tokenizer, train_on="all_turns").train[0]
    assert _trained(whole, byte_tokenizer) == ["we<eos>", "and<eos>"]
    assert byte_tokenizer.decode(whole["input_ids"]) == (
        "\n\nHuman: hi\n\nAssistant: we<eos>\n\nHuman: lo\n\nAssistant: and<eos>"
    )


def test_transcripts_and_questions_become_turns_under_chat(byte_tokenizer, rows_of):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    start, end = FAMILIES["chatml"].special
    transcript = "\n\nHuman: hi \n\nHuman: you\n\nAssistant:  we\n\nHuman: lo\n\nAssistant:"
    row = rows_of({"prompt": transcript, "response": " and"}, tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == (
        f"{start}user\nhi\n\nyou{end}\n{start}assistant\nwe{end}\n"
        f"{start}user\nlo{end}\n{start}assistant\nand{end}"
    )
    row = rows_of({"prompt": "Once upon a time", "response": " there"}, tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == (
        f"{start}user\nOnce upon a time{end}\n{start}assistant\nthere{end}"
    )


def test_end_token_in_the_data_is_not_doubled(any_tokenizer, rows_of):
    tokenizer = with_template(any_tokenizer, FAMILIES["zephyr"])
    row = rows_of({"prompt": TALK[:1], "response": "lo<end><end>"}, tokenizer).train[0]
    assert _trained(row, tokenizer) == ["lo<end>"]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2  # and that of the question


def test_an_answer_without_words_never_trains(byte_tokenizer, rows_of, write_rows):
    tokenizer = with_template(byte_tokenizer, FAMILIES["llama-2"])
    silent = [TALK[0], {"role": "assistant", "content": " "}, *TALK[2:]]
    data = rows_of({"messages": silent}, tokenizer)
    assert _trained(data.train[0], tokenizer) == ["a word <end>"]


def test_truncation_moves_spans_and_drops_halves(byte_tokenizer, rows_of):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    whole = rows_of({"messages": TALK}, tokenizer).train[0]
    (first, stop), (last, length) = _spans(whole)
    for cut in range(1, length - 12, 3):
        data = rows_of({"messages": TALK}, tokenizer, max_seq_len=length - cut)
        row, report = data.train[0], data.report.sources[0]
        assert row["input_ids"] == whole["input_ids"][cut:]
        kept = [first - cut, stop - cut] if first > cut else []
        assert row["trained"] == [*kept, last - cut, length - cut]
        assert (report.prompts_cut, report.turns_cut) == (2, 0 if kept else 2)
    assert "2 earlier answers lost their beginning" in data.report.lines()[0]


def test_a_template_that_rewrites_earlier_answers_trains_the_last_alone(byte_tokenizer, rows_of):
    tokenizer = with_template(byte_tokenizer, THINKING)
    with pytest.raises(UserError, match=r"set/train\.jsonl line 1: .*earlier answers otherwise"):
        rows_of({"messages": TALK}, tokenizer)
    row = rows_of({"messages": TALK}, tokenizer, train_on="last_turn").train[0]
    assert _trained(row, tokenizer) == ["<think></think>a word<|im_end|>"]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (ENDLESS, "ends no answer with a special token"),
        (COUNTING, "writes the prompt otherwise once it is answered"),
    ],
)
def test_templates_that_cannot_serve_are_refused(family, words, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, family)
    with pytest.raises(UserError, match=words) as caught:
        set_format(tokenizer)
    assert "--prompt_format dschat" in str(caught.value) and "\n" not in str(caught.value)
    assert set_format(tokenizer, "dschat").name == "dschat"
