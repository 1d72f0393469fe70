"""A chatbot: a model folder on a device, the conversation so far, answers as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dschat.chat.conversation import Turn, fit_conversation, settled_part
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import check_kind, load_config
from dschat.rlhf.generation import StopStrings
from dschat.text.encoding import decode, encode, truncate_left
from dschat.text.formats import set_format
from dschat.text.ordinary import as_ordinary
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import torch_dtype


class _Answer(BaseStreamer):
    """Collects the ids of an answer and hands on its text as it settles."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        stop: str | None,
        show: Callable[[str], None],
    ):
        self.tokenizer, self.stop, self.show = tokenizer, stop, show
        # A text's first token may lose its space in decoding; after some context it keeps it.
        self.context = prompt_ids[-4:]
        self.ids: list[int] = []
        self.shown = ""
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which generation hands over first, then one token at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.ids += value.reshape(-1).tolist()
        self._advance(final=False)

    def end(self) -> None:
        """Show what was held back."""
        self._advance(final=True)

    @property
    def text(self) -> str:
        """Entire answer so far, without special tokens."""
        return self._decode(self.context + self.ids)[len(self._decode(self.context)) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids, skip_special_tokens=True)

    def _advance(self, final: bool) -> None:
        settled = settled_part(self.text, self.stop, final)
        self.show(settled[len(self.shown) :])
        self.shown = settled


class Chatbot:
    """Model, its tokenizer, and the conversation so far."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings
    ):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.form = set_format(tokenizer)
        self.has_turns = not settings.raw and self.form.name != "raw"
        self.turns: list[Turn] = []
        self.max_prompt_len = prompt_room(model.config, settings.max_new_tokens)

        self.system = settings.system
        if self.system is not None and not settings.raw:
            if not self.has_turns:
                raise UserError(
                    f"system: {settings.path} learned from texts without turns; drop it"
                )
            self.system = as_ordinary(tokenizer, self.system)

    @property
    def opening(self) -> str:
        """What stands on a screen before an answer."""
        return f"Assistant:{self.form.opening}" if self.has_turns else ""

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns = []

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Return the answer to a text, handing its pieces to `show` as they come.

        Ctrl-C ends the answer; what was said stays in the conversation.
        """
        bos_id = self.tokenizer.bos_token_id
        if not self.settings.raw:  # as in the rows of training
            text = as_ordinary(self.tokenizer, text)
        if not self.has_turns:
            (ids,) = encode(self.tokenizer, [text])
            room = len(ids) if self.max_prompt_len is None else self.max_prompt_len
            return self._generate(truncate_left(ids, room, bos_id), None, show)
        ids = fit_conversation(
            self.turns, text, self._encode, self.max_prompt_len, bos_id, self.form, self.system
        )
        answer = self._generate(ids, self.form.stop, show)
        self.turns.append(Turn(text, as_ordinary(self.tokenizer, answer.rstrip())))
        return answer

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, [text], self.form.adds_special)[0]

    @torch.inference_mode()
    def _generate(self, ids: list[int], stop: str | None, show: Callable[[str], None]) -> str:
        answer = _Answer(self.tokenizer, ids, stop, show)
        prompt = torch.tensor([ids], device=self.model.device)  # (1, T)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.settings.temperature > 0:
            top_p, temperature = self.settings.top_p, self.settings.temperature
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        criteria = StoppingCriteriaList()
        if stop is not None:  # a model may go on with the next question
            criteria.append(StopStrings((stop,), self.tokenizer, len(ids)))
        try:
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                streamer=answer,
                stopping_criteria=criteria,
                **sampling,
            )
        except KeyboardInterrupt:
            answer.end()
        return answer.shown


def prompt_room(config: PretrainedConfig, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have beside an answer; None where nothing limits it."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    if max_new_tokens >= context:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: "
            f"give less than the model's context, {context} tokens"
        )
    return context - max_new_tokens


def pick_device(name: str) -> torch.device:
    """Return the device of that name, or of `auto`; UserError where there is none such."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: not on this machine; leave it out, or give cpu"
        ) from error
    return torch.device(name)


def load_chatbot(settings: ChatSettings) -> Chatbot:
    """Load the folder's model and tokenizer onto the device."""
    device = pick_device(settings.device)
    check_kind(settings.path)
    tokenizer = load_hf_tokenizer(settings.path)
    dtype = torch.float32 if settings.dtype == "auto" else torch_dtype(settings.dtype)
    saved = load_config(settings.path).dtype
    if settings.dtype == "auto" and device.type != "cpu" and isinstance(saved, torch.dtype):
        dtype = saved
    torch.manual_seed(settings.seed)
    model = create_hf_model(settings.path, tokenizer, dtype)
    nn.Module.to(model, device)
    return Chatbot(model, tokenizer, settings)
