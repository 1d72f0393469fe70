"""Chat templates of the common families, written anew, and tokenizers that carry them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A template, the token that ends its answers, and all the special tokens that it writes."""

    template: str
    end: str
    special: tuple[str, ...] = ()


_EACH = "{% for m in messages %}"
_DONE = "{% endfor %}"
_CHATML = (
    _EACH + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}" + _DONE
)
_OPEN_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_IM = ("<|im_start|>", "<|im_end|>")
_HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"

FAMILIES = {
    "chatml": Family(_CHATML + _OPEN_CHATML, "<|im_end|>", _IM),
    # Puts a system turn of its own in front where the conversation has none.
    "system turn": Family(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + _CHATML + _OPEN_CHATML,
        "<|im_end|>",
        _IM,
    ),
    "llama-2": Family(
        "{% if messages[0]['role'] == 'system' %}"
        "{% set start = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set start = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (start if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}" + _DONE,
        "<end>",
    ),
    "llama-3": Family(
        "{{ bos_token }}"
        + _EACH
        + "{{ "
        + _HEADER
        + " + m['content'] | trim + '<|eot_id|>' }}"
        + _DONE
        + "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "zephyr": Family(
        _EACH
        + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
        + _DONE
        + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "<end>",
    ),
    # No special token in front of an answer: what could merge with it is ordinary text.
    "trimming": Family(
        _EACH
        + "{{ m['role'] + ':' + (' ' + m['content'] | trim) }}"
        + "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        + _DONE
        + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "<end>",
    ),
}
# Writes thoughts in front of the last answer alone, so earlier answers are not what was generated.
THINKING = Family(
    _EACH
    + "{{ '<|im_start|>' + m['role'] + '\\n' }}"
    + "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    + "{{ m['content'] + '<|im_end|>\\n' }}"
    + _DONE
    + _OPEN_CHATML,
    "<|im_end|>",
    _IM,
)
ENDLESS = Family(_EACH + "{{ m['role'] + ': ' + m['content'] + '\\n' }}" + _DONE, "")
# Says how long the conversation is, in front of it.
COUNTING = Family("{{ messages | length }}" + _CHATML + _OPEN_CHATML, "<|im_end|>", _IM)


def with_template(tokenizer: PreTrainedTokenizerFast, family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer with a BOS and an end token of its own, the family's tokens and template."""
    special = ["<begin>", "<end>", *family.special]
    tokenizer.add_special_tokens(
        {"bos_token": "<begin>", "eos_token": "<end>", "additional_special_tokens": []}
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True) for token in special], special_tokens=True
    )
    tokenizer.chat_template = family.template
    return tokenizer
