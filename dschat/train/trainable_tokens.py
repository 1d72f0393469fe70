"""Choose the tokens whose rows of embedding and head train beside the adapters."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

import datasets
from transformers import PreTrainedTokenizerBase

from dschat.data.datasets import PromptData
from dschat.errors import UserError
from dschat.text.tokenizer import end_is_new
from dschat.train.model_config import AUTO, NONE
from dschat.utils.module.untrained_rows import TokenChoice

SAMPLE = 256  # rows of the data in which special tokens are looked for


def named_tokens(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, prefix: str = ""
) -> dict[int, str]:
    """Map the ids of tokens that are given by text or id to their texts.

    Args:
        prefix: of the setting's name, for messages.

    Raises:
        UserError: no such token (with the nearest), or no such id.
    """
    vocabulary, tokens, setting = tokenizer.get_vocab(), {}, f"{prefix}trainable_tokens"
    for name in names:
        if name.isdecimal() and int(name) < len(tokenizer):
            tokens[int(name)] = str(tokenizer.convert_ids_to_tokens(int(name)))
        elif name.isdecimal():
            raise UserError(
                f"{setting} {name}: no such id; the tokenizer's are below {len(tokenizer)}"
            )
        elif name in vocabulary:
            tokens[vocabulary[name]] = name
        else:
            near = difflib.get_close_matches(name, vocabulary, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give tokens or ids that it has"
            raise UserError(f"{setting} {name!r}: the tokenizer has no such token; {hint}")
    return tokens


def asked_tokens(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, prefix: str = ""
) -> TokenChoice:
    """Choose the tokens that are given by name; none for `auto` and `none`.

    Raises:
        UserError: as `named_tokens`.
    """
    if tuple(names) in (AUTO, NONE):
        return TokenChoice()
    return TokenChoice(named_tokens(names, tokenizer, prefix), always=True)


def choose_tokens(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, data: PromptData
) -> TokenChoice:
    """Choose by name, or with `auto` the end token and the special tokens in the data's first rows.

    Whether those of `auto` train depends on their rows in the model (`TokenChoice.reasons`).

    Raises:
        UserError: as `named_tokens`.
    """
    if tuple(names) != AUTO:
        return asked_tokens(names, tokenizer)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # `load_hf_tokenizer` stops without one
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    rows = data.train if isinstance(data.train, datasets.Dataset) else data.eval
    read, predicted = {end}, {end}
    for row in rows.select(range(min(SAMPLE, len(rows)))):
        for ids, answers in _sequences(row):
            read |= special.intersection(ids)
            for start, stop in answers:
                predicted |= special.intersection(ids[start:stop])
    texts = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(read)}
    added = frozenset({end} if end_is_new(tokenizer) else ())
    return TokenChoice(texts, frozenset(predicted), added)


def _sequences(row: Mapping) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yield a row's sequences of ids, each with the spans of its answers."""
    for name in ("input_ids", "chosen_ids", "rejected_ids", "prompt_ids"):
        if name in row:
            spans = row.get("trained", ())
            yield row[name], list(zip(spans[::2], spans[1::2], strict=True))
