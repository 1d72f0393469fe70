"""Ids from a cache of words are those of the tokenizer, on texts made to trip it up."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from dschat.text import word_cache as module
from dschat.text.encoding import encode, encode_answers
from dschat.text.word_cache import word_cache

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "the cat isn't in the hat,  said the cat.\n\nHuman: is it 1234 or 56?\n\nAssistant: it is ",
    "a b c d\n    return the thing   and then\tsome more ... !!! é café naïve 漢字 e\u0301 🙂",
    "I'll say: 'don't', (never) mind the gap; 3.14 and 2,718 and x_y\r\n\r\n<b>bold</b> ½",
] * 4
PIECES = [
    *" \n\t\r\u3000\u00a0\x1c\u200b'’.,!?:;()<>_-¨½²é漢🙂▁xXsTéÅ0129",
    *(
        "  ",
        "   ",
        "\n\n",
        "the",
        " the",
        "Human",
        "'s",
        "isn't",
        "e\u0301",
        "\u0308",
        "</s>",
        "12",
    ),
]


def byte_level(*before, normalizer=None, **options):
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = [*before, pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def by_spaces(pre_tokenizer=None, normalizer=None):
    trainer = BpeTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    # Trained on words, as SentencePiece does, so that no token has ▁ in its middle.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


LLAMA2 = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
CACHED = {
    "gpt2": lambda: byte_level(),
    "gpt2 with a space in front": lambda: byte_level(add_prefix_space=True),
    "gpt_neox": lambda: byte_level(normalizer=normalizers.NFC()),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama3": lambda: byte_level(split(LLAMA3), use_regex=False),
    "qwen2": lambda: byte_level(
        split(LLAMA3.replace("{1,3}", "")), use_regex=False, normalizer=normalizers.NFC()
    ),
    "llama2": lambda: by_spaces(normalizer=normalizers.Sequence(LLAMA2)),
    "metaspace": lambda: by_spaces(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}


def ready(backend: Tokenizer) -> PreTrainedTokenizerFast:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.Sequence(
        [
            *([backend.post_processor] if backend.post_processor else []),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module", params=CACHED)
def tokenizer(request):
    return ready(CACHED[request.param]())


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    fixed = ["", " ", "  ", "\n", " a", "a ", "a \n b", "</s> the", "the</s>the", *CORPUS[:3]]
    return fixed + ["".join(draw.choices(PIECES, k=draw.randint(1, 25))) for _ in range(count)]


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_tokenizers(tokenizer, special):
    assert word_cache(tokenizer) is not None
    some = texts(1500)
    expected = tokenizer(some, add_special_tokens=special)["input_ids"]
    assert encode(tokenizer, some, special) == expected
    assert encode(tokenizer, some, special) == expected  # when every word is known


def test_answers_are_what_follows_their_prompts(tokenizer):
    """Where the pieces meet at a cut, prompt ids + answer ids are the ids of the whole text."""
    prompts, answers = texts(800, seed=1), [f" {text}" for text in texts(800, seed=2)]
    heads = encode(tokenizer, prompts)
    ids = encode_answers(tokenizer, prompts, heads, answers)
    whole = tokenizer([p + a for p, a in zip(prompts, answers, strict=True)])["input_ids"]
    met = 0
    for prompt, answer, head, tail, both in zip(prompts, answers, heads, ids, whole, strict=True):
        if prompt and not prompt[-1].isspace() and "</s>" not in answer:
            met += 1
            assert head + tail == [*both, tokenizer.eos_token_id], (prompt, answer)
    assert met > 300


def test_a_full_cache_begins_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_MAX_WORDS", 20)
    some = texts(300, seed=3)
    expected = tokenizer(some)["input_ids"]
    assert [encode(tokenizer, [text])[0] for text in some] == expected


def test_truncation_of_an_earlier_call_does_not_linger(tokenizer):
    text = "never a word that was seen before, nowhere"
    tokenizer(text, truncation=True, max_length=3, padding="max_length")
    assert encode(tokenizer, [text]) == [tokenizer(text)["input_ids"]]


def inner_space():
    backend = by_spaces(normalizer=normalizers.Sequence(LLAMA2))
    vocabulary = backend.get_vocab() | {"t▁": 500, "t▁t": 501}
    merges = [("t", "▁"), ("t▁", "t")]
    backend.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")
    return backend


NOT_CACHED = {
    "a pattern of its own": lambda: byte_level(split(r"\w+ \w+|\s+|\W+"), use_regex=False),
    "a pattern beside GPT-2's": lambda: byte_level(split(r"the cat")),
    "a normalizer of its own": lambda: byte_level(normalizer=normalizers.Strip()),
    "tokens of several words": inner_space,
    "whole words": lambda: Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "the": 2, "<unk>": 3}, unk_token="<unk>")
    ),
}


@pytest.mark.parametrize("make", NOT_CACHED.values(), ids=NOT_CACHED)
def test_other_tokenizers_have_no_cache(make):
    tokenizer = ready(make())
    assert word_cache(tokenizer) is None
    assert encode(tokenizer, ["the cat", "the"]) == tokenizer(["the cat", "the"])["input_ids"]


def test_a_cache_that_fails_the_probes_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "cuts_before_spaces", lambda backend: True)
    assert word_cache(ready(byte_level(split(r"\w+ \w+|\s+|\W+"), use_regex=False))) is None
