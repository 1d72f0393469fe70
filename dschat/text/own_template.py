"""The format `dschat` as a chat template, for programs that read a model folder without dschat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.text.chat_template import render
from dschat.text.conversations import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What `DschatFormat.prompt` writes, and an end token after an answer that ends the conversation.
TEMPLATE = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% set space = ' ' if text and not text[0].isspace() else '' %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman:' + space + text }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant:' + space + text }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% elif message['role'] == 'system' %}{{ text }}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ': use user or assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
_TALK = (Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Oh"), Turn("user", "?"))


def template_of(
    tokenizer: PreTrainedTokenizerBase, write: Callable[[tuple[Turn, ...]], str]
) -> str | None:
    """Make the chat template of a tokenizer without one, whose prompts `write` writes.

    Programs that serve models know of templates alone. It writes the BOS where the tokenizer puts
    one; None where it would not give the ids of training.
    """
    first = tokenizer("x")["input_ids"][:1]
    puts_bos = bool(first) and first[0] == tokenizer.bos_token_id
    template = ("{{ bos_token }}" if puts_bos else "") + TEMPLATE
    tokenizer.chat_template = template
    try:
        for turns in (_TALK, _TALK[1:2]):
            ours = tokenizer(write(turns))["input_ids"]
            text = render(tokenizer, turns, is_open=True)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ours:
                return None
    except UserError:
        return None
    finally:
        tokenizer.chat_template = None
    return template
