"""Conversations: turns, the examples that rows become, and checks of messages and transcripts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dschat.errors import UserError

ROLES = ("system", "user", "assistant")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

# How lists of messages name their roles: OpenAI's and ShareGPT's words.
SPEAKERS = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
}

# Keys of a message beside its text that hold a part of what is said, and what their absence is.
BESIDE_TEXT: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("tool_calls", "function_call"), (None, [], {})),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), (None, "")),
    "weight": (None, 1),
}

MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, by one of `ROLES`."""

    role: str
    text: str


# A prompt is a conversation, or a text: a transcript of one, or a question.
Prompt = str | tuple[Turn, ...]


@dataclass(frozen=True)
class Example:
    """One row of any source: a prompt, its answer, and the answer it was preferred to.

    Attributes:
        train_all_turns: the prompt's own answers are worth training on too: the row is a
            conversation to imitate, not the context of one answer.
        margin: by how much the chosen answer is better, in units of scores.
        subset: name of the part of its source that the row belongs to.
        place: position of the row in its source ("train.jsonl line 17"), for messages.
        columns: columns of the row itself that are kept beside its texts, as a JSON object; None:
            none are.
    """

    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    train_all_turns: bool = False
    place: str = ""
    columns: str | None = None
    margin: float | None = None
    subset: str | None = None


def kind_of(value: Any) -> str:
    """Name the kind of a row's value in plain words."""
    kinds = {
        type(None): "missing or null",
        bool: "true or false",
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"of type {type(value).__name__}")


class Skip(Exception):  # noqa: N818  (no error: the row is sound)
    """Raised by a reader for a sound row that it has no use for; the text is the reason."""


def question(text: Any) -> tuple[Turn, ...]:
    """Make a conversation of one question; anything but text is left to the caller's check."""
    return (Turn("user", text),)


def has_markers(text: str) -> bool:
    """Return whether a text is a transcript with `Human:` in it."""
    return any(match[1] == "Human" for match in MARKER.finditer(text))


def parse_transcript(text: str) -> tuple[Turn, ...]:
    """Parse a `Human:` and `Assistant:` transcript into stripped turns, merging those of one role.

    Text before the first marker is a system turn. An open `Assistant:` at the end is no turn.
    """
    marks = list(MARKER.finditer(text))
    pieces = [("system", text[: marks[0].start()] if marks else text)]
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        role = "user" if mark[1] == "Human" else "assistant"
        pieces.append((role, text[mark.end() : after.start() if after else len(text)]))
    return merge(Turn(role, piece.strip()) for role, piece in pieces)


def merge(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Drop empty turns, and join neighbours of one role."""
    merged: list[Turn] = []
    for turn in turns:
        if not turn.text:
            continue
        if merged and merged[-1].role == turn.role:
            merged[-1] = Turn(turn.role, f"{merged[-1].text}\n\n{turn.text}")
        else:
            merged.append(turn)
    return tuple(merged)


def as_turns(prompt: Prompt) -> tuple[Turn, ...]:
    """Read a prompt as a conversation: a transcript is parsed, any other text is one question."""
    if not isinstance(prompt, str):
        return prompt
    if has_markers(prompt):
        return parse_transcript(prompt)
    return question(prompt.strip()) if prompt.strip() else ()


def read_messages(
    value: Any, column: str, role: str = "role", text: str = "content"
) -> tuple[Turn, ...]:
    """Parse messages of a conversation from its start, whose roles must take turns.

    Raises:
        UserError: malformed messages, or roles that do not alternate from user on (one system
            message may come first).
    """
    turns = parse_messages(value, column, role, text)
    check_order(turns, column)
    return turns


def parse_messages(
    value: Any, column: str, role: str = "role", text: str = "content"
) -> tuple[Turn, ...]:
    """Parse a list of messages, each an object with the keys `role` and `text`.

    Raises:
        UserError: no list, empty, a message that is none, an unknown role, text that is none.
    """
    if not isinstance(value, list | tuple):
        raise UserError(f"column {column!r} is {kind_of(value)}, needs a list of messages")
    if not value:
        raise UserError(f"column {column!r} holds no messages; fix or drop the row")
    turns = []
    for number, message in enumerate(value, 1):
        place = f"column {column!r}, message {number}"
        if not isinstance(message, Mapping) or role not in message or text not in message:
            raise UserError(f"{place}: needs an object with the keys {role!r} and {text!r}")
        speaker = SPEAKERS.get(message[role]) if isinstance(message[role], str) else None
        if speaker is None:
            known = ", ".join(SPEAKERS)
            raise UserError(f"{place}: role {message[role]!r} is unknown; use one of {known}")
        if not isinstance(message[text], str):
            kind = kind_of(message[text])
            raise UserError(f"{place}: {text!r} is {kind}, needs text; fix or drop the row")
        for key, nothing in BESIDE_TEXT.items():
            if message.get(key) not in nothing:
                raise UserError(
                    f"{place}: {key!r} is {message[key]!r:.40}, which no prompt format here heeds; "
                    f"put what the model sees or says into {text!r}, or drop the key"
                )
        turns.append(Turn(speaker, message[text]))
    return tuple(turns)


def check_order(turns: Sequence[Turn], column: str) -> None:
    """Check that user and assistant alternate, user first, after at most one system turn."""
    start = int(bool(turns) and turns[0].role == "system")
    for number, turn in enumerate(turns[start:], start):
        expected = ("user", "assistant")[(number - start) % 2]
        if turn.role != expected:
            raise UserError(
                f"column {column!r}, message {number + 1}: is from {turn.role} where {expected} "
                "should speak; after at most one system message, user and assistant take turns"
            )


def split_answer(turns: tuple[Turn, ...]) -> Example:
    """Divide a conversation to imitate into its last answer and, before it, the prompt.

    Raises:
        Skip: it ends in a question although it holds answers.
        UserError: it holds nothing but a system message.
    """
    if turns[-1].role == "assistant":
        return Example(turns[:-1], turns[-1].text, train_all_turns=True)
    if any(turn.role == "assistant" for turn in turns):
        raise Skip("conversation ends without an answer")
    if turns[-1].role == "system":
        raise UserError("the conversation holds a system message alone; fix or drop the row")
    return Example(turns)
