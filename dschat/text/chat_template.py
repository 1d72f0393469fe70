"""The tokenizer's own chat template as a prompt format, and the token that ends its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.errors import UserError, brief
from dschat.text.conversations import Prompt, Turn, as_turns
from dschat.utils.bounded import TooMuchError, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USE_DSCHAT = "fix the template or use --prompt_format dschat"
_REMEDY = "fix or drop the row, or use --prompt_format dschat"
# A template takes far less than a millisecond, writes some thousand characters of its own, and may
# escape or repeat those of the conversation.
_ENDLESS = f"an operation of the chat template does not end; {USE_DSCHAT}"
_SECONDS, _BYTES, _CHARACTERS, _TIMES = 10.0, 2e9, 1_000_000, 20


@dataclass(frozen=True)
class ChatFormat:
    """The chat template of a tokenizer, which puts BOS where it wants one.

    A text prompt becomes turns first: a transcript is parsed, any other text is one question.
    """

    tokenizer: PreTrainedTokenizerBase

    name = "chat"
    adds_special = False
    stop = None
    opening = " "

    def prompt(self, prompt: Prompt) -> str:
        """Write the text up to an open answer."""
        turns = as_turns(prompt)
        if not turns or turns[-1].role == "assistant":
            raise UserError(
                "the prompt ends inside an answer, or is empty, where a chat template opens a new "
                "answer; fix or drop the row, or use --prompt_format dschat"
            )
        return self._render(turns, is_open=True)

    def earlier(self, prompt: Prompt) -> list[str]:
        """Divide the prompt's text into context, answer, context, …, ending in a context.

        The end tokens between an answer and the next context are left out.

        Raises:
            UserError: the template writes an answer otherwise once the conversation goes on.
        """
        turns, text = as_turns(prompt), self.prompt(prompt)
        pieces, at, end = [], 0, self.tokenizer.eos_token
        for number, turn in enumerate(turns):
            if turn.role == "assistant" and turn.text.strip():
                opened = self._render(turns[:number], is_open=True)
                closed = opened + self.answer(turns[:number], opened, turn.text)
                if not text.startswith(closed + end) or at > len(opened):
                    raise UserError(
                        "the chat template writes earlier answers otherwise than the last one, so "
                        "they cannot train as they are generated; use --train_on last_turn or "
                        "--prompt_format dschat"
                    )
                pieces += [text[at : len(opened)], text[len(opened) : len(closed)]]
                at = len(closed) + len(end)
        return [*pieces, text[at:]]

    def answer(self, prompt: Prompt, opened: str, text: str) -> str:
        """Write the text of an answer to `prompt`, whose own text is `opened`.

        Raises:
            UserError: the template changes the prompt when the answer is there, drops the answer's
                text, or does not end it with the end token.
        """
        end = self.tokenizer.eos_token
        while text.endswith(end):
            text = text.removesuffix(end)
        if isinstance(prompt, str):
            text = text.strip()  # its first space belongs to the transcript
        content = text.strip()
        if not content:
            return ""
        rendered = self._render((*as_turns(prompt), Turn("assistant", text)), is_open=False)
        if not rendered.startswith(opened):
            raise UserError(
                "the chat template writes the prompt otherwise once it is answered, so prompt and "
                f"answer cannot be separated; {USE_DSCHAT}"
            )
        tail = rendered[len(opened) :]
        start = tail.find(content)
        stop = tail.find(end, start + len(content))
        if start < 0 or stop < 0:
            fault = f"does not end it with {end!r}" if start >= 0 else "changes its text"
            raise UserError(
                f"the chat template {fault} (answer {content[:30]!r}), so what trains would not "
                f"be what is generated; {USE_DSCHAT}"
            )
        return tail[:stop]

    def _render(self, turns: tuple[Turn, ...], *, is_open: bool) -> str:
        return render(self.tokenizer, turns, is_open)


def render(tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...], is_open: bool) -> str:
    """Write a conversation by the chat template, with an answer opened after it if `is_open`.

    Raises:
        UserError: the template fails, or takes or writes too much.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    given = sum(len(turn.text) for turn in turns)
    try:
        with bounded(_SECONDS, _BYTES, _ENDLESS):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_open
            )
    except TooMuchError as error:
        raise UserError(
            f"the chat template takes {error} for a conversation of {given:,} characters; {_REMEDY}"
        ) from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(
            f"the chat template refuses the conversation ({brief(error)}); {_REMEDY}"
        ) from error
    assert isinstance(text, str)
    if len(text) > _CHARACTERS + _TIMES * given:
        raise UserError(
            f"the chat template makes {len(text):,} characters of a conversation of {given:,}; "
            f"{_REMEDY}"
        )
    return text


def template_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the special token that ends answers in the chat template.

    Raises:
        UserError: there is none, or the template writes the prompt otherwise once it is answered.
    """
    name, question, answer = tokenizer.name_or_path, (Turn("user", "Question"),), "Answer"
    try:
        opened = render(tokenizer, question, True)
        rendered = render(tokenizer, (*question, Turn("assistant", answer)), False)
    except UserError as error:
        raise UserError(f"tokenizer {name!r}: {error}") from error
    if not rendered.startswith(opened):
        raise UserError(
            f"tokenizer {name!r}: its chat template writes the prompt otherwise once it is "
            f"answered; {USE_DSCHAT}"
        )
    tail = rendered[len(opened) :].partition(answer)[2].lstrip()
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    end = max((token for token in tokens if tail.startswith(token)), key=len, default=None)
    if end is None:
        raise UserError(
            f"tokenizer {name!r}: its chat template ends no answer with a special token, so "
            f"nothing would tell a model to stop; {USE_DSCHAT}"
        )
    return end
