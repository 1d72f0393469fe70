"""Readers of rows by their columns, and the formats of all: which columns have which reader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import PurePath
from typing import Any

from dschat.data import named_readers as named
from dschat.data.columns import Row, pick_number
from dschat.errors import UserError
from dschat.text.conversations import (
    ASSISTANT,
    HUMAN,
    Example,
    Skip,
    Turn,
    as_turns,
    kind_of,
    parse_messages,
    read_messages,
    split_answer,
)

Reader = Callable[[Row], Example]

LOCAL_JSON = "local/jsonfile"
ANSWER_COLUMNS = ("chosen", "response", "completion")
SPLIT_EARLIER = "the two sides differ before the last answer"


def read_standard(row: Row) -> Example:
    """Columns prompt, chosen (or response, completion) and rejected: text, or lists of messages.

    A pair may have a margin, a number, and a subset, the name of its part of the set.
    """
    if "prompt" not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"no column 'prompt' (columns: {columns}); rename the columns to prompt, chosen or "
            "response, rejected, or map yours with --dataset_columns prompt=... chosen=..."
        )
    prompt, rejected = row["prompt"], row.get("rejected")
    chosen = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    of_pair = pair_columns(row)
    if isinstance(prompt, list | tuple):
        check_tools(row)
        turns = read_messages(prompt, "prompt")
        if turns[-1].role != "user":
            raise UserError("column 'prompt' does not end with the user's turn; fix the row")
        example = Example(turns, _side(chosen, "chosen", turns), _side(rejected, "rejected", turns))
    elif not isinstance(chosen, list | tuple):
        example = Example(prompt, chosen, rejected)
    elif parse_messages(chosen, "chosen")[0].role == "assistant":
        turns = as_turns(prompt) if isinstance(prompt, str) else ()
        example = Example(turns, _side(chosen, "chosen", turns), _side(rejected, "rejected", turns))
    elif rejected is not None:
        example = _message_pair(chosen, rejected)
    else:
        example = split_answer(read_messages(chosen, "chosen"))
    return replace(example, **of_pair)


def pair_columns(row: Row) -> dict[str, Any]:
    """Read what the row of a pair may say of it: columns margin, a number, and subset, a name.

    Raises:
        Skip: both answers have the same score. UserError: a margin that is no finite number.
    """
    scores = row.get("score_chosen"), row.get("score_rejected")
    if None not in scores and scores[0] == scores[1]:
        raise Skip("tie")
    if row.get("rejected") is None:
        return {}
    margin = None if row.get("margin") is None else pick_number(row, "margin")
    subset = None if row.get("subset") is None else str(row["subset"])
    return {"margin": margin, "subset": subset}


def _side(value: Any, column: str, prompt: tuple[Turn, ...]) -> Any:
    """Read the answer of one side: text, one message, or the prompt's messages with one more."""
    if not isinstance(value, list | tuple):
        return value
    turns = parse_messages(value, column)
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(rest) != 1 or rest[0].role != "assistant":
        raise UserError(
            f"column {column!r} holds {len(rest)} messages after the prompt, needs one answer of "
            "the assistant; fix or drop the row"
        )
    return rest[0].text


def read_pair(row: Row) -> Example:
    """Columns chosen and rejected without a prompt: it is what both sides begin with.

    Margin and subset as in `read_standard`.
    """
    chosen, rejected, of_pair = row.get("chosen"), row.get("rejected"), pair_columns(row)
    if isinstance(chosen, list | tuple):
        check_tools(row)
        return replace(_message_pair(chosen, rejected), **of_pair)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            kind = kind_of(value)
            raise UserError(f"column {column!r} is {kind}, needs text; fix or drop the row")
    return replace(_transcript_pair(str(chosen), str(rejected)), **of_pair)


def _message_pair(chosen: Any, rejected: Any) -> Example:
    left, right = read_messages(chosen, "chosen"), read_messages(rejected, "rejected")
    shared = 0
    while shared < min(len(left), len(right)) - 1 and left[shared] == right[shared]:
        shared += 1
    if {len(left), len(right)} != {shared + 1} or left[shared].role != "assistant":
        raise Skip(SPLIT_EARLIER)
    return Example(left[:shared], left[shared].text, right[shared].text)


def _transcript_pair(chosen: str, rejected: str) -> Example:
    """Divide two complete transcripts where they part, after the last `Assistant:` they share."""
    shared = commonprefix([chosen, rejected])  # noqa: RUF071  (of texts, not of paths)
    start = shared.rfind(ASSISTANT) + len(ASSISTANT)
    if start < len(ASSISTANT):
        raise UserError(
            f"chosen and rejected share no {ASSISTANT!r} after which they part, and there is no "
            "column 'prompt'; add one, or map yours with --dataset_columns prompt=..."
        )
    sides = chosen[start:], rejected[start:]
    if any(HUMAN in side for side in sides):
        raise Skip(SPLIT_EARLIER)
    return Example(chosen[:start], *sides)


def check_tools(row: Row) -> None:
    """Refuse a conversation with tools: a chat template would have shown them to the model."""
    if row.get("tools"):
        raise UserError(
            "column 'tools' is shown to the model by no prompt format here; write them into a "
            "system message, or drop the column"
        )


def read_chat(row: Row) -> Example:
    """Column messages: a list of role and content."""
    check_tools(row)
    return split_answer(read_messages(row.get("messages"), "messages"))


def read_sharegpt(row: Row) -> Example:
    """Column conversations: a list of from and value, or of role and content."""
    check_tools(row)
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, list | tuple) and turns else None
    has_roles = isinstance(first, Mapping) and "role" in first
    keys = ("role", "content") if has_roles else ("from", "value")
    return split_answer(read_messages(turns, "conversations", *keys))


@dataclass(frozen=True)
class RowFormat:
    """Rows that have at least these columns, and their reader.

    `holds` looks at a first row where common words name the columns; None: they are enough.
    """

    columns: frozenset[str]
    read: Reader
    holds: Callable[[Row], bool] | None = None


def _format(columns: str, read: Reader, **more: Any) -> RowFormat:
    return RowFormat(frozenset(columns.split()), read, **more)


STANDARD = _format("prompt", read_standard)
_MKQA = "queries answers"
_MIRACL = _format("query positive_passages negative_passages", named.read_miracl)

NAMED = {
    "Dahoas/rm-static": STANDARD,
    "Dahoas/full-hh-rlhf": STANDARD,
    "Dahoas/synthetic-instruct-gptj-pairwise": _format(
        "prompt chosen rejected", named.read_synthetic_instruct
    ),
    "yitingxie/rlhf-reward-datasets": _format("prompt chosen rejected", named.read_rlhf_reward),
    "openai/webgpt_comparisons": _format(
        "question answer_0 answer_1 score_0 score_1", named.read_webgpt
    ),
    "stanfordnlp/SHP": _format("history human_ref_A human_ref_B labels", named.read_shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": _format(
        "prompt label", named.read_vicuna, holds=named.is_vicuna
    ),
    "wangrui6/Zhihu-KOL": _format("INSTRUCTION RESPONSE", named.read_zhihu),
    "Cohere/miracl-zh-queries-22-12": _MIRACL,
    "Hello-SimpleAI/HC3-Chinese": _format("question human_answers chatgpt_answers", named.read_hc3),
    "mkqa-Chinese": _format(_MKQA, named.read_mkqa_chinese),
    "mkqa-Japanese": _format(_MKQA, named.read_mkqa_japanese),
    "Cohere/miracl-ja-queries-22-12": _MIRACL,
    "lmqg/qg_jaquad": _format("question sentence paragraph", named.read_jaquad),
    "lmqg/qag_jaquad": _format("questions paragraph", named.read_jaquad_paragraph),
    LOCAL_JSON: STANDARD,
}
# Known by columns. Of several that fit, one with more of the columns counts; else it is unclear.
FORMATS = (
    STANDARD,
    *(
        _format(f"prompt {more}", read_standard)
        for more in ("chosen", "response", "completion", "chosen rejected", "rejected")
    ),
    _format("prompt chosen rejected messages", read_standard),  # UltraFeedback, binarized
    _format("chosen rejected", read_pair),
    _format("messages", read_chat),
    _format("prompt messages", read_chat),  # UltraChat: its prompt is the first message
    _format("conversations", read_sharegpt),
    _format("instruction output", named.read_alpaca),
    _format("instruction completions", named.read_completions),
    _format("prompt completions", named.read_completions),
    *(
        NAMED[name]
        for name in (
            "openai/webgpt_comparisons",
            "stanfordnlp/SHP",
            "pvduy/sharegpt_alpaca_oa_vicuna_format",
            "wangrui6/Zhihu-KOL",
            "Cohere/miracl-zh-queries-22-12",
            "Hello-SimpleAI/HC3-Chinese",
            "lmqg/qg_jaquad",
            "lmqg/qag_jaquad",
        )
    ),
    _format(_MKQA, named.refuse_mkqa),
)
# Columns of so common names that every other format goes before.
QUESTION = _format("question answer", named.read_question)


def format_by_name(name: str) -> RowFormat | None:
    """Find the format of a Hub name, or of a path that ends in one or passes through its cache."""
    parts = PurePath(name).parts
    if PurePath(name).suffix in (".json", ".jsonl", ".parquet"):
        parts = parts[:-1]
    for known, row_format in NAMED.items():
        ends = {known.rpartition("/")[2], known.replace("/", "___")} - {"jsonfile"}
        cached = f"datasets--{known.replace('/', '--')}"
        if name == known or (parts and (parts[-1] in ends or cached in parts)):
            return row_format
    return None
