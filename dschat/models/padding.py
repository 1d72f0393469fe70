"""Padding of a saved reward model, which must not be its end token."""

from __future__ import annotations

import copy
import re
from operator import itemgetter

from transformers import PreTrainedTokenizerBase


def classifier_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a tokenizer for classifiers of transformers: padding on the right, no end token.

    They take the last token that is not padding for the end of a text, so they would not read an
    end token that pads as well. The new padding is a token of the vocabulary that stands in no
    text; where there is none, the end token stays.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        token = _special_token_apart(tokenizer) or _part_of_a_character(tokenizer)
        tokenizer.pad_token = token or tokenizer.pad_token
    return tokenizer


def _special_token_apart(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Find a special token but the end token: for padding or unused, else BOS, else another.

    The unknown token comes last: it stands for characters that texts hold.
    """
    tokens = [
        token.content
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i != tokenizer.eos_token_id
    ]
    spare = [token for token in tokens if re.search("pad|reserved|unused|extra", token, re.I)]
    bos, unknown = tokenizer.bos_token, tokenizer.unk_token
    known = [token for token in tokens if token != unknown]
    order = [*spare, *(token for token in tokens if token == bos), *known, *tokens]
    return next(iter(order), None)


def _part_of_a_character(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Find a token of bytes that break off inside a character, as no text does (GPT-2's `âĢ`)."""
    for piece, i in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)):
        # One letter long, its name could stand in a text, where it would be taken for the token.
        names_bytes = len(piece) > 1 and not piece.endswith("ï¿½")  # bytes of a real U+FFFD
        if names_bytes and str(tokenizer.decode(i)).endswith("\ufffd"):
            return piece
    return None
