"""Single answers to token rows, as a reward model reads them: prompt, answer, end token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.text.conversations import Example
from dschat.text.encoding import truncate
from dschat.text.ordinary import ordinary_examples


def answer_rows(
    convert: Converter,
    examples: Sequence[Example],
    ended: Sequence[bool] | None = None,
    counts: Counter[str] | None = None,
) -> list[dict[str, Any]]:
    """Tokenise prompts with their chosen answers, in their order; none is dropped.

    Args:
        counts: gets the numbers of prompts and answers that were cut to the longest length.
        ended: False for an answer that a limit cut: it gets no end token. None: all have ended.

    Returns:
        Rows with the columns of `tokenise.FEATURES[1]`, of which the answer alone is trained.

    Raises:
        UserError: an example without an answer.
    """
    examples = list(examples)
    for example in examples:
        if example.chosen is None:
            raise UserError(f"{example.place}: has no answer; add a column response")
    if not convert.keep_special_tokens:
        examples, _ = ordinary_examples(convert.tokenizer, examples)
    ids, (answers,) = convert.encoded(examples, ("chosen",))
    bos_id, rows = convert.tokenizer.bos_token_id, []
    ends = [True] * len(answers) if ended is None else ended
    for prompt, answer, has_end in zip(ids, answers, ends, strict=True):
        short = truncate(prompt, [answer], convert.max_len, bos_id)
        (kept,), start = short.answers, len(short.prompt)
        if counts is not None:
            counts.update(prompts_cut=short.prompt_cut, answers_cut=short.answers_cut)
        if not has_end and start + len(kept) > 1:  # a text of nothing but its end keeps it
            kept = kept[:-1]
        length = start + len(kept)
        rows.append(
            {
                **{"input_ids": short.prompt + kept, "trained": [start, length]},
                **{"prompt_len": start, "length": length},
            }
        )
    return rows
