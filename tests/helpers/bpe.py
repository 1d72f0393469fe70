"""Two tiny BPE tokenizers of different kinds, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MERGES_BYTE = [("Ġ", "w"), ("h", "i"), ("Ċ", "Ċ"), ("l", "o"), ("Ġw", "e")]
MERGES_SPACE = [("▁", "a"), ("▁", "w"), ("n", "d"), ("▁a", "nd"), ("h", "i"), ("l", "o")]


def _bpe(
    alphabet: list[str], merges: list[tuple[str, str]], special: list[str], **options: object
) -> Tokenizer:
    pieces = [*special, *alphabet, *(left + right for left, right in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS; `<eos>` is 0, `<pad>` is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _bpe(alphabet, MERGES_BYTE, ["<eos>", "<pad>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def space_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that puts `▁` before every text, with BOS; `<s>` is 1, `</s>` is 2 and also the pad."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.:!?", "▁", "\n"]
    backend = _bpe(letters, MERGES_SPACE, ["<unk>", "<s>", "</s>"], unk_token="<unk>")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
