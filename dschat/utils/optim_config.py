"""Settings of the optimizer: learning rates of the named groups, weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dschat.settings import Settings, setting

FIRST_RATIO = 16.0  # lambda that the LoRA+ authors try first
# Adapters start from two to three times the rate of full fine-tuning: A and B at one rate, or,
# under a ratio, the geometric mean of their two (docs/lora_plus.md has the measurements).
FULL_TO_LORA_RATE = 3.0


def first_lora_rate(full_rate: float, ratio: float, factor: float = FULL_TO_LORA_RATE) -> float:
    """First learning rate of A to try: `factor` times full fine-tuning's over the ratio's root."""
    return factor * full_rate / math.sqrt(ratio)


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Learning rates of every parameter group, weight decay, and AdamW's constants.

    Attributes:
        full_rate: learning rate that suits training all weights in this step, of a model of
            `full_rate_size` parameters; adapters take `full_to_lora` times as much. No flags.
    """

    learning_rate: float | None = setting(
        None,
        "learning rate of all that trains (default: {full_rate:g}, of adapters another)",
        above=0,
        may_change=True,
    )
    weight_decay: float = setting(
        0.0, "weight decay, except on biases and normalisation", at_least=0
    )
    lora_learning_rate: float | None = setting(
        None,
        "learning rate of A (default: the learning rate given, else what suits the ratio)",
        above=0,
        may_change=True,
    )
    loraplus_lr_ratio: float = setting(
        FIRST_RATIO, "LoRA+: learning rate of B over that of A", above=0, may_change=True
    )
    lora_embedding_learning_rate: float = setting(
        1e-6, "learning rate of adapters on embeddings", above=0, may_change=True
    )
    trainable_tokens_learning_rate: float | None = setting(
        None,
        "learning rate of the rows of --trainable_tokens (default: that of B)",
        above=0,
        may_change=True,
    )
    head_learning_rate: float | None = setting(
        None,
        "learning rate of a reward or value head (default: the learning rate)",
        above=0,
        may_change=True,
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    full_rate: float = 1e-5
    full_rate_size: float = 1.3e9
    full_to_lora: float = FULL_TO_LORA_RATE

    @property
    def base_rate(self) -> float:
        """Learning rate of everything but adapters and heads with rates of their own."""
        return self.full_rate if self.learning_rate is None else self.learning_rate

    @property
    def lora_A_rate(self) -> float:
        """eta_A: the adapters' own rate, else the rate given, else what suits the ratio."""
        first = first_lora_rate(self.full_rate, self.loraplus_lr_ratio, self.full_to_lora)
        return self.lora_learning_rate or self.learning_rate or first

    @property
    def token_rows_rate(self) -> float:
        """Learning rate of single rows of embedding and head."""
        default = self.loraplus_lr_ratio * self.lora_A_rate
        return self.trainable_tokens_learning_rate or default

    def rate(self, group: str) -> float:
        """Learning rate of a named group."""
        return {
            "lora_A": self.lora_A_rate,
            "lora_B": self.loraplus_lr_ratio * self.lora_A_rate,
            "lora_magnitude": self.lora_A_rate,
            "lora_embedding": self.lora_embedding_learning_rate,
            "token_rows": self.token_rows_rate,
            "head": self.head_learning_rate or self.base_rate,
        }.get(group, self.base_rate)
