"""Small tokenizers built as those of common models are, and texts made to trip them up."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

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
TOKENIZERS = {
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
    """Give a tokenizer its BOS in front, and `</s>` as end and pad."""
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


def texts(count: int, seed: int = 0) -> list[str]:
    """Draw so many texts of pieces that meet in odd ways, after some fixed ones."""
    draw = random.Random(seed)
    fixed = ["", " ", "  ", "\n", " a", "a ", "a \n b", "</s> the", "the</s>the", *CORPUS[:3]]
    return fixed + ["".join(draw.choices(PIECES, k=draw.randint(1, 25))) for _ in range(count)]
