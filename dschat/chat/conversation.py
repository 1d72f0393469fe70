"""Conversation as text: prompts of the training data, truncated to fit, shown as they settle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dschat.text.conversations import Turn as Said
from dschat.text.encoding import truncate_left
from dschat.text.formats import DschatFormat, PromptFormat


@dataclass(frozen=True)
class Turn:
    """One question and the answer it got, as it was generated."""

    question: str
    answer: str


class Talker(Protocol):
    """Whoever answers: a model in this process, or a server."""

    @property
    def opening(self) -> str:
        """What stands on a screen before an answer."""
        ...

    def clear(self) -> None:
        """Forget the conversation."""

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Return the answer, handing its pieces to `show` as they come."""
        ...


def format_conversation(
    turns: Sequence[Turn],
    question: str,
    form: PromptFormat | None = None,
    system: str | None = None,
) -> str:
    """Return the prompt of the training data: turns, the question, and an open answer.

    `form` is the model's prompt format; by default dschat. `system` comes before the turns.
    """
    said = [] if system is None else [Said("system", system)]
    said += [
        Said(role, text)
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    return (form or DschatFormat()).prompt((*said, Said("user", question)))


def fit_conversation(
    turns: Sequence[Turn],
    question: str,
    encode_text: Callable[[str], list[int]],
    max_len: int | None,
    bos_id: int | None,
    form: PromptFormat | None = None,
    system: str | None = None,
) -> list[int]:
    """Return the prompt's token ids in at most `max_len` (None: any number).

    The oldest turns are dropped first, `system` never; a question too long by itself loses its left
    end and keeps a leading `bos_id`.
    """
    for first in range(len(turns) + 1):
        ids = encode_text(format_conversation(turns[first:], question, form, system))
        if max_len is None or len(ids) <= max_len:
            return ids
    assert max_len is not None  # the loop has returned else
    return truncate_left(ids, max_len, bos_id)


def settled_part(text: str, stop: str | None, final: bool = False) -> str:
    """Return the part of a growing answer that will not change any more, up to `stop`.

    Held back until `final` are half a character and the beginning of `stop`.
    """
    stop = stop or ""
    if stop and stop in text:
        return text[: text.index(stop)]
    if final:
        return text
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for size in range(min(len(stop), len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return text[:-size]
    return text
