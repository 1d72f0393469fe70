"""What a training came to: its figures, its folder, its model, a conversation with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dschat.chat.bot import Chatbot, load_chatbot
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.report.records import Records, read
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import resolve_dtype, torch_dtype


@dataclass(frozen=True)
class Run:
    """A run that has ended, or whose folder lies there from before; as a path, its model's folder.

    Attributes:
        folder: all that it wrote: metrics.jsonl, report.html, checkpoints.
        model_folder: its model, which the next step and `transformers` load.
        scores: its model is a reward model.
    """

    folder: Path
    model_folder: Path
    scores: bool = False

    def __fspath__(self) -> str:
        return str(self.model_folder)

    @cached_property
    def records(self) -> Records:
        """All figures by step, held-out ones apart, warnings, sampled answers."""
        return read(self.folder)

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the last evaluation, by name."""
        return {name: points[-1][1] for name, points in self.records.held_out.items()}

    @property
    def page(self) -> Path:
        """The run's page, with curves, warnings and answers."""
        return self.folder / "report.html"

    def tokenizer(self) -> Any:
        """Load the tokenizer that belongs to the model."""
        return load_hf_tokenizer(str(self.model_folder))

    def model(self, dtype: str = "auto") -> nn.Module:
        """Load the model in eval mode; a reward model gives a score at every token.

        Args:
            dtype: fp32, bf16, fp16; auto is bf16 where the device has it.
        """
        create = create_critic_model if self.scores else create_hf_model
        name = str(self.model_folder)
        return create(name, self.tokenizer(), torch_dtype(resolve_dtype(dtype))).eval()

    def chatbot(self, **flags: Any) -> Chatbot:
        """Start a conversation; flags are those of `dschat chat`.

        Raises:
            UserError: the run's model gives scores and does not answer.
        """
        if self.scores:
            raise UserError(f"{self.model_folder}: a reward model does not answer; use model()")
        return load_chatbot(ChatSettings.of(path=str(self.model_folder), **flags))

    def chat(self, text: str, **flags: Any) -> str:
        """Answer one text; a conversation is `chatbot()`."""
        return self.chatbot(**flags).ask(text, lambda piece: None).strip()
