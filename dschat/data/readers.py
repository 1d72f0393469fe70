"""Readers of rows known by their columns: pairs, transcripts, messages, instructions, prompts."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from dschat.errors import UserError
from dschat.text.conversations import (
    ASSISTANT,
    HUMAN,
    Example,
    Skip,
    Turn,
    as_turns,
    parse_messages,
    question,
    read_messages,
    split_answer,
)

Row = Mapping[str, Any]
ANSWER_COLUMNS = ("chosen", "response", "completion")
SCORE_KEYS = ("fine-grained_score", "overall_score", "score")
SPLIT_EARLIER = "the two sides differ before the last answer"


def pick(row: Row, path: str) -> Any:
    """Take the value of a column, or of a field inside one: `question.full_text`, `answers.0.text`.

    A list that is too short, or nothing where a field should be, gives None.

    Raises:
        UserError: there is no such column or field.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        elif value is None:
            return None
        else:
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"no column {path!r} (columns: {columns}); name another with --dataset_columns"
            )
    return value


def pick_text(row: Row, path: str) -> str:
    """Take the text at a path.

    Raises:
        Skip: nothing is there. UserError: something else than text is.
    """
    value = pick(row, path)
    if value is None or value == "":
        raise Skip(f"no {path}")
    if not isinstance(value, str):
        raise UserError(
            f"column {path!r} is {type(value).__name__}, needs text; fix or drop the row"
        )
    return value


def pick_number(row: Row, path: str) -> float:
    """Take the number at a path, also where it is written as text; else a UserError."""
    value = pick(row, path)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"column {path!r} is {value!r}, needs a number; fix the row") from error


def read_standard(row: Row) -> Example:
    """Columns prompt, chosen (or response, completion) and rejected: text, or lists of messages."""
    if "prompt" not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"no column 'prompt' (columns: {columns}); rename the columns to prompt, chosen or "
            "response, rejected, or map yours with --dataset_columns prompt=... chosen=..."
        )
    prompt, rejected = row["prompt"], row.get("rejected")
    chosen = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    _refuse_tie(row)
    if isinstance(prompt, list | tuple):
        turns = read_messages(prompt, "prompt")
        if turns[-1].role != "user":
            raise UserError("column 'prompt' does not end with the user's turn; fix the row")
        return Example(turns, _side(chosen, "chosen", turns), _side(rejected, "rejected", turns))
    if isinstance(chosen, list | tuple):
        if rejected is not None and _begins_with_user(chosen):
            return _message_pair(chosen, rejected)
        if _begins_with_user(chosen):
            return split_answer(read_messages(chosen, "chosen"))
        turns = as_turns(prompt) if isinstance(prompt, str) else ()
        return Example(turns, _side(chosen, "chosen", turns), _side(rejected, "rejected", turns))
    return Example(prompt, chosen, rejected)


def _refuse_tie(row: Row) -> None:
    scores = row.get("score_chosen"), row.get("score_rejected")
    if None not in scores and scores[0] == scores[1]:
        raise Skip("tie")


def _begins_with_user(messages: Sequence[Any]) -> bool:
    return parse_messages(messages, "chosen")[0].role != "assistant"


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
    """Columns chosen and rejected without a prompt: it is what both sides begin with."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    _refuse_tie(row)
    if isinstance(chosen, list | tuple):
        return _message_pair(chosen, rejected)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"column {column!r} is {kind}, needs text; fix or drop the row")
    return _transcript_pair(str(chosen), str(rejected))


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


def read_chat(row: Row) -> Example:
    """Column messages: a list of role and content."""
    return split_answer(read_messages(row.get("messages"), "messages"))


def read_sharegpt(row: Row) -> Example:
    """Column conversations: a list of from and value, or of role and content."""
    turns = row.get("conversations")
    has_roles = isinstance(turns, list | tuple) and turns and "role" in _keys(turns[0])
    keys = ("role", "content") if has_roles else ("from", "value")
    return split_answer(read_messages(turns, "conversations", *keys))


def _keys(message: Any) -> tuple[str, ...]:
    return tuple(message) if isinstance(message, Mapping) else ()


def read_alpaca(row: Row) -> Example:
    """Columns instruction, output and maybe input, which follows the instruction."""
    question_text = pick_text(row, "instruction")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise UserError(f"column 'input' is {type(more).__name__}, needs text; fix the row")
    prompt = f"{question_text}\n\n{more}" if more else question_text
    return Example(question(prompt), pick_text(row, "output"))


def read_completions(row: Row) -> Example:
    """Column completions, scored answers to instruction (or prompt): the best and the worst."""
    prompt = pick_text(row, "instruction" if "instruction" in row else "prompt")
    answers = row.get("completions")
    if not isinstance(answers, list | tuple) or not all(isinstance(a, Mapping) for a in answers):
        raise UserError("column 'completions' needs a list of objects; fix or drop the row")
    scored = []
    for answer in answers:
        key = next((key for key in SCORE_KEYS if answer.get(key) is not None), None)
        if key is not None:
            scored.append((pick_number(answer, key), pick_text(answer, "response")))
    if len(scored) < 2:
        raise Skip("fewer than two scored completions")
    worst, best = (bound(scored, key=lambda pair: pair[0]) for bound in (min, max))
    if worst[0] == best[0]:
        raise Skip("tie")
    return Example(question(prompt), best[1], worst[1])
