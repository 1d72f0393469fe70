"""Conversations as the text a model reads: `dschat` turns, the tokenizer's chat template, or none.

A format gives a prompt's text (`prompt`), the same text cut where earlier answers begin and end
(`earlier`), and an answer's text (`answer`). The end token follows each answer that trains; it is
the tokenizer's `eos_token` in every format and is in none of these texts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.text.chat_template import ChatFormat, template_end
from dschat.text.conversations import ASSISTANT, HUMAN, MARKER, Prompt, as_turns
from dschat.text.own_template import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FORMATS = ("dschat", "chat", "raw")
CONFIG_KEY = "prompt_format"  # in tokenizer_config.json, which every model folder carries


class DschatFormat:
    """`\\n\\nHuman: …\\n\\nAssistant:`, with answers that begin with a space.

    A transcript stays as it is, and so do its answers; any other text is one question. Nothing but
    the next marker ends an earlier answer, save where that answer trains.
    """

    name = "dschat"
    adds_special = True  # the tokenizer puts its BOS in front
    stop: str | None = HUMAN  # who goes on to play the other side has ended the answer
    opening = ""  # between "Assistant:" on a screen and an answer

    def prompt(self, prompt: Prompt) -> str:
        """Write the text up to an open answer; UserError where nothing is asked."""
        return "".join(self.earlier(prompt))

    def earlier(self, prompt: Prompt) -> list[str]:
        """Divide the prompt's text into context, answer, context, …, ending in a context."""
        if isinstance(prompt, str):
            if MARKER.search(prompt):
                return _transcript_pieces(prompt)
            prompt = as_turns(prompt)
        if not prompt:
            raise UserError("the prompt is empty; fix or drop the row, or use --prompt_format raw")
        pieces = [""]
        for turn in prompt:
            if turn.role == "assistant":
                pieces[-1] += ASSISTANT
                # An answer without words has nothing to teach.
                pieces += [_spaced(turn.text), ""] if turn.text.strip() else []
            elif turn.role == "user":
                pieces[-1] += HUMAN + _spaced(turn.text)
            else:
                # Without a marker: a base model has read none that means instructions.
                pieces[-1] += turn.text
        pieces[-1] += ASSISTANT
        return pieces

    def answer(self, prompt: Prompt, opened: str, text: str) -> str:
        """Write the text of an answer to `prompt`, whose own text is `opened`."""
        is_transcript = isinstance(prompt, str) and MARKER.search(prompt)
        return text if is_transcript else _spaced(text)


def _transcript_pieces(text: str) -> list[str]:
    """Divide a transcript, with an open answer at its end, into context, answer, context, …"""
    marks = list(MARKER.finditer(text))
    if marks[-1][1] == "Human":
        text += ASSISTANT
        marks = list(MARKER.finditer(text))
    pieces, at = [], 0
    for mark, after in pairwise(marks):
        if mark[1] == "Assistant" and text[mark.end() : after.start()].strip():
            pieces += [text[at : mark.end()], text[mark.end() : after.start()]]
            at = after.start()
    return [*pieces, text[at:]]


def _spaced(text: str) -> str:
    return text if not text or text[0].isspace() else f" {text}"


class RawFormat:
    """Prompts and answers as they stand, one after the other."""

    name = "raw"
    adds_special = True
    stop = None
    opening = ""

    def prompt(self, prompt: Prompt) -> str:
        """Return the text; UserError for a conversation, which only a format can write."""
        if isinstance(prompt, str):
            return prompt
        if len(prompt) != 1:
            raise UserError(
                f"prompt_format raw writes no turns, and the prompt is a conversation of "
                f"{len(prompt)}; use dschat or chat"
            )
        return prompt[0].text

    def earlier(self, prompt: Prompt) -> list[str]:
        """Return the text in one piece."""
        return [self.prompt(prompt)]

    def answer(self, prompt: Prompt, opened: str, text: str) -> str:
        """Return the text."""
        return text


PromptFormat = DschatFormat | ChatFormat | RawFormat


def choose_format(
    tokenizer: PreTrainedTokenizerBase, asked: str | None = None, *, teaches: bool = False
) -> PromptFormat:
    """Choose the format of a model by its tokenizer, which stays as it is.

    It is the one asked for, else the one stored, else `chat` where the tokenizer has a template.
    The rule looks at no data, so that scripts without data come to the same answer.

    Args:
        teaches: the model is about to learn the format (step 1), so another than the stored one
            may be asked for; anywhere else it would be read what it never learned.

    Raises:
        UserError: a format that contradicts the stored one, or a template that is missing.
    """
    stored = tokenizer.init_kwargs.get(CONFIG_KEY)
    if stored is not None and stored not in PROMPT_FORMATS:
        raise UserError(
            f"{tokenizer.name_or_path}: {CONFIG_KEY} in tokenizer_config.json is {stored!r}; "
            f"give one of {', '.join(PROMPT_FORMATS)}"
        )
    if asked and stored and asked != stored and not teaches:
        raise UserError(
            f"--prompt_format {asked}: {tokenizer.name_or_path} was trained with the format "
            f"{stored!r}; leave the flag out, or train step 1 again with it"
        )
    name = asked or stored or ("chat" if tokenizer.chat_template else "dschat")
    if name != "chat":
        return DschatFormat() if name == "dschat" else RawFormat()
    if not tokenizer.chat_template:
        raise UserError(
            f"--prompt_format chat: the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template; give a model that has one, or use --prompt_format dschat"
        )
    return ChatFormat(tokenizer)


def set_format(
    tokenizer: PreTrainedTokenizerBase,
    asked: str | None = None,
    *,
    teaches: bool = False,
    end_is_given: bool = False,
) -> PromptFormat:
    """Choose the format and note it in the tokenizer, which is saved with the model.

    Under `chat` the token that ends answers in the template becomes the `eos_token`. Under `dschat`
    a tokenizer without a template gets one that writes the same, by which others prompt the model.

    Args:
        asked, teaches: as in `choose_format`.
        end_is_given: the user has named the end token, so the template must not change it.

    Raises:
        UserError: as `choose_format`; a template that cannot serve, or contradicts the end token.
    """
    form = choose_format(tokenizer, asked, teaches=teaches)
    if isinstance(form, ChatFormat):
        end = template_end(tokenizer)
        if end != tokenizer.eos_token and end_is_given:
            raise UserError(
                f"--eot_token {tokenizer.eos_token!r}: the chat template of "
                f"{tokenizer.name_or_path!r} ends answers with {end!r}; leave --add_eot_token out, "
                "or use --prompt_format dschat"
            )
        if end != tokenizer.eos_token:
            tokenizer.eos_token = end
    if isinstance(form, DschatFormat) and not tokenizer.chat_template:
        tokenizer.chat_template = template_of(tokenizer, form.prompt)  # for other programs
    tokenizer.init_kwargs[CONFIG_KEY] = form.name
    return form


def describe_format(
    form: PromptFormat, tokenizer: PreTrainedTokenizerBase, stored: str | None
) -> str:
    """Describe prompts in one line; `stored` is the format that the model came with."""
    what = {
        "dschat": "Human: and Assistant:",
        "chat": "the tokenizer's chat template",
        "raw": "texts as they stand",
    }[form.name]
    line = f"prompt format {form.name} ({what}), answers end with {tokenizer.eos_token!r}"
    return line if stored in (None, form.name) else f"{line}; the model came with {stored}"
