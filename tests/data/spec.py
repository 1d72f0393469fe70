"""A tokenised set by its settings and lengths in one place: a test states what it changes."""

from __future__ import annotations

from typing import Any

from dschat.data.config import SFTDataConfig
from dschat.data.datasets import PromptData, create_prompt_dataset


class Spec:
    """Settings of `SFTDataConfig` by name, with seed, max_seq_len and max_prompt_len."""

    def __init__(
        self, *, seed: int = 1234, max_seq_len: int, max_prompt_len: int | None = None, **flags: Any
    ):
        self.lengths = {"seed": seed, "max_seq_len": max_seq_len, "max_prompt_len": max_prompt_len}
        self.flags, self.config = flags, SFTDataConfig.of(**flags)

    def but(self, **changes: Any) -> Spec:
        """The same with other values."""
        return Spec(**{**self.lengths, **self.flags, **changes})

    def make(self, tokenizer, phase: int, **more: Any) -> PromptData:
        """The set of a phase."""
        return create_prompt_dataset(self.config, tokenizer, phase, **self.lengths, **more)
