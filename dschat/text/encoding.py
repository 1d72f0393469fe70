"""Texts to token ids, prompt and answer split exactly; truncation; fingerprints of tokenizers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError, brief
from dschat.text.formats import choose_format
from dschat.text.ordinary import MARK, encode_marked, without_marks

# An answer that merges with its prompt is tokenised after one of these instead. They are of
# different classes (newline, punctuation, letter), so whatever an answer begins with, at least one
# of them is kept apart from it by common pre-tokenizers.
SENTINELS = ("\n", ":", "a")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True
) -> list[list[int]]:
    """Encode each text, with the tokenizer's own BOS if `special`.

    Names of special tokens are the tokens, save those that `ordinary.as_ordinary` has marked.

    Raises:
        UserError: a pattern of the tokenizer gives up, for example one that backtracks forever.
    """
    plain = [text for text in texts if MARK not in text]
    marked = [text for text in texts if MARK in text]
    ids: list[list[int]] = []
    try:
        if plain:
            ids = tokenizer(
                plain,
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # longer than model_max_length is normal: rows are truncated later
            )["input_ids"]
        if not marked:
            return ids
        of_marked = iter(encode_marked(tokenizer, marked, special))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, and no `Exception`
            raise
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: gives up on a text ({brief(error)}); look at "
            "the patterns of its normalizer and pre_tokenizer in tokenizer.json"
        ) from error
    of_plain = iter(ids)
    return [next(of_marked if MARK in text else of_plain) for text in texts]


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = False
) -> str:
    """Decode ids to their text, spaces as they are."""
    return str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    prompt_ids: list[list[int]],
    answers: list[str],
    special: bool = True,
) -> list[list[int]]:
    """Encode each answer as the continuation of its prompt, ending in exactly one eos.

    The prompt's ids stay those of the prompt alone (what generation sees; `special` as they were
    encoded with), no token straddles the boundary, and prompt ids + answer ids decode to
    prompt + answer.
    """
    eos = tokenizer.eos_token
    bare = []
    for answer in answers:
        while answer.endswith(eos):
            answer = answer[: -len(eos)]
        bare.append(answer)
    joined = encode(tokenizer, [p + a for p, a in zip(prompts, bare, strict=True)], special)
    answer_ids, merged = [], []
    for row, (ids, head) in enumerate(zip(joined, prompt_ids, strict=True)):
        answer_ids.append(ids[len(head) :])
        if ids[: len(head)] != head:
            merged.append(row)
    if merged:
        heads, texts = [prompt_ids[row] for row in merged], [bare[row] for row in merged]
        for row, ids in zip(merged, _encode_apart(tokenizer, heads, texts), strict=True):
            answer_ids[row] = ids
    end = tokenizer.eos_token_id  # looked up once: transformers takes microseconds for it
    for ids in answer_ids:
        ids.append(end)
    return answer_ids


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[tuple[str, str]]], special: bool = True
) -> list[list[tuple[list[int], list[int]]]]:
    """Encode conversations, each a list of (context, answer) texts in their order.

    Each answer ends in one eos and is the continuation of its context, as in `encode_answers`; a
    context after an answer has the ids of a text after that eos.
    """
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    first = _encode_pairs(tokenizer, [row[0] for row in rows], special)
    later_texts = [(eos + context, answer) for row in rows for context, answer in row[1:]]
    later = iter(_encode_pairs(tokenizer, later_texts, special=False))
    conversations = []
    for row, pair in zip(rows, first, strict=True):
        pairs = [pair]
        for _ in row[1:]:
            context, answer = next(later)
            if context[0] != eos_id:
                raise UserError(
                    f"tokenizer {tokenizer.name_or_path!r}: its end token {eos!r} is not one token "
                    "inside a text; save it as a special token, or use --train_on last_turn"
                )
            pairs.append((context[1:], answer))
        conversations.append(pairs)
    return conversations


def join_turns(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Join all ids before the last answer; find the spans of earlier answers that are not empty."""
    ids: list[int] = []
    spans: list[int] = []
    for context, answer in pairs[:-1]:
        ids += context
        if len(answer) > 1:
            spans += [len(ids), len(ids) + len(answer)]
        ids += answer
    return ids + pairs[-1][0], spans


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], special: bool
) -> list[tuple[list[int], list[int]]]:
    contexts, answers = [context for context, _ in pairs], [answer for _, answer in pairs]
    ids = encode(tokenizer, contexts, special)
    encoded = encode_answers(tokenizer, contexts, ids, answers, special)
    return list(zip(ids, encoded, strict=True))


def _encode_apart(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], answers: list[str]
) -> list[list[int]]:
    """Encode answers that would merge with their prompts, apart from them.

    Alone, an answer may gain a space (tokenizers that put `▁` before every text), so it is
    tokenised after a sentinel whose ids are stripped again. The first candidate that decodes to
    the answer's own text after the prompt is taken; where the tokenizer normalises text and none
    does, the first candidate.
    """
    candidates: list[list[list[int]]] = [[] for _ in answers]
    for sentinel in SENTINELS:
        head = encode(tokenizer, [sentinel], special=False)[0]
        texts = [sentinel + answer for answer in answers]
        for row, ids in enumerate(encode(tokenizer, texts, special=False)):
            if ids[: len(head)] == head:
                candidates[row].append(ids[len(head) :])
    for row, alone in enumerate(encode(tokenizer, answers, special=False)):
        candidates[row].append(alone)
    chosen = []
    for head, answer, options in zip(prompt_ids, answers, candidates, strict=True):
        expected = f"{tokenizer.decode(head)}{without_marks(answer)}"
        right = (ids for ids in options if tokenizer.decode(head + ids) == expected)
        chosen.append(next(right, options[0]))
    return chosen


@dataclass(frozen=True)
class Truncated:
    """One prompt and its answers, short enough to be joined; `answers_cut` were shortened."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: bool
    answers_cut: int


def truncate(
    prompt: list[int], answers: Sequence[list[int]], max_len: int, bos_id: int | None
) -> Truncated:
    """Shorten one prompt and its answers so that the prompt and any one answer fit in `max_len`.

    An answer may take what the prompt leaves, or half of `max_len` if that is more; a longer one
    loses its right end and still ends in its own last token. The prompt then gives way from the
    left, by the longest answer and alike for all of them, keeping a leading `bos_id`.
    """
    budget = max(max_len - len(prompt), max_len // 2)
    kept = [
        answer if len(answer) <= budget else [*answer[: budget - 1], answer[-1]]
        for answer in answers
    ]
    head = truncate_left(prompt, max_len - max(map(len, kept)), bos_id)
    shortened = sum(len(answer) > budget for answer in answers)
    return Truncated(head, kept, len(head) < len(prompt), shortened)


def truncate_left(ids: list[int], max_len: int, bos_id: int | None) -> list[int]:
    """Keep the last `max_len` ids, or a leading `bos_id` and the last `max_len - 1`."""
    if len(ids) <= max_len:
        return ids
    if bos_id is not None and ids[0] == bos_id and max_len > 0:
        return [bos_id, *ids[len(ids) - (max_len - 1) :]]
    return ids[len(ids) - max_len :]


def shift_spans(spans: list[int], shift: int) -> list[int]:
    """Move the spans of a prompt that lost `shift` tokens on the left; drop the incomplete ones.

    An answer that lost its beginning is context like any other text: it would be learned as the
    answer to nothing. The token in front of an answer must be there too, since it predicts it.
    """
    if not shift:
        return spans
    return [
        bound - shift
        for start, stop in zip(spans[::2], spans[1::2], strict=True)
        if start > shift
        for bound in (start, stop)
    ]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides ids: backend, special ids, a chat template in use."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # What an earlier call asked for, not part of the tokenizer: padding and truncation are
    # switched on and off in the backend by each call.
    for transient in ("padding", "truncation"):
        backend.pop(transient, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if choose_format(tokenizer).name == "chat":
        special.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()
