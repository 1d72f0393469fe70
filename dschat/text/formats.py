"""Conversations as the text a model reads: `dschat` turns, or the tokenizer's own chat template.

A format gives a prompt's text (`prompt`), the same text cut where earlier answers begin and end
(`earlier`), and an answer's text (`answer`). The end token follows each answer that trains; it is
the tokenizer's `eos_token` in both formats and is in none of these texts.
"""

from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError, brief
from dschat.text.conversations import (
    ASSISTANT,
    HUMAN,
    Prompt,
    Turn,
    answers_within,
    as_turns,
)

PROMPT_FORMATS = ("dschat", "chat")
CONFIG_KEY = "prompt_format"  # in tokenizer_config.json, which every model folder carries
USE_DSCHAT = "fix the template or use --prompt_format dschat"


class DschatFormat:
    """`\\n\\nHuman: …\\n\\nAssistant:`, with answers that begin with a space.

    A prompt that is text stays as it is, and so do its answers. Nothing but the next marker ends
    an earlier answer, save where that answer trains.
    """

    name = "dschat"
    adds_special = True  # the tokenizer puts its BOS in front
    stop: str | None = HUMAN  # who goes on to play the other side has ended the answer
    opening = ""  # between "Assistant:" on a screen and an answer

    def prompt(self, prompt: Prompt) -> str:
        """Write the text up to an open answer."""
        return prompt if isinstance(prompt, str) else "".join(self.earlier(prompt))

    def earlier(self, prompt: Prompt) -> list[str]:
        """Divide the prompt's text into context, answer, context, …, ending in a context."""
        if isinstance(prompt, str):
            return answers_within(prompt)
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
        return text if isinstance(prompt, str) else _spaced(text)


def _spaced(text: str) -> str:
    return text if not text or text[0].isspace() else f" {text}"


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
                f"answer cannot be told apart; {USE_DSCHAT}"
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
    """Write a conversation by the chat template, with an answer opened after it if `is_open`."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_open
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"the chat template refuses the conversation ({brief(error)}); fix or drop the row, "
            "or use --prompt_format dschat"
        ) from error
    assert isinstance(text, str)
    return text


PromptFormat = DschatFormat | ChatFormat


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
            f"{stored!r}; leave the flag out, or train step 1 anew with it"
        )
    name = asked or stored or ("chat" if tokenizer.chat_template else "dschat")
    if name == "dschat":
        return DschatFormat()
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

    Under `chat` the token that ends answers in the template becomes the `eos_token`.

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
    tokenizer.init_kwargs[CONFIG_KEY] = form.name
    return form


def describe_format(
    form: PromptFormat, tokenizer: PreTrainedTokenizerBase, stored: str | None
) -> str:
    """Describe prompts in one line; `stored` is the format that the model came with."""
    what = "the tokenizer's chat template" if form.name == "chat" else "Human: and Assistant:"
    line = f"prompt format {form.name} ({what}), answers end with {tokenizer.eos_token!r}"
    return line if stored in (None, form.name) else f"{line}; the model came with {stored}"


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
