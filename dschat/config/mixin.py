"""Flags of the language modelling that PPO mixes in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.data.text_blocks import TextBlocks, create_text_blocks
from dschat.errors import UserError
from dschat.settings import Settings, setting

DEFAULT_COEFFICIENT = 1.0  # both gradients are about as large (docs/ppo/rewards.md)


@dataclass(frozen=True)
class MixInArguments(Settings):
    """Flags of PTX."""

    unsupervised_dataset_name: str | None = setting(
        None, "text that the actor goes on learning beside PPO: file, folder or hub id"
    )
    unsupervised_dataset_config_name: str | None = setting(None, "configuration of a hub id")
    unsup_coef: float = setting(
        DEFAULT_COEFFICIENT,
        "weight of that text's mean loss per token against PPO's mean loss per token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unsupervised_dataset_name is None:
            if self.unsupervised_dataset_config_name is not None:
                raise UserError(
                    f"unsupervised_dataset_config_name {self.unsupervised_dataset_config_name}: "
                    "there is no text; give --unsupervised_dataset_name, or drop it"
                )
            return
        if not (math.isfinite(self.unsup_coef) and self.unsup_coef > 0):
            raise UserError(
                f"unsup_coef is {self.unsup_coef}: give a number above 0, or drop "
                "--unsupervised_dataset_name"
            )

    def blocks(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        cache: str,
        once: Callable[[Callable[[], str]], str],
    ) -> TextBlocks | None:
        """The text in blocks of `length` tokens; None where none is asked for."""
        if self.unsupervised_dataset_name is None:
            return None
        name, config = self.unsupervised_dataset_name, self.unsupervised_dataset_config_name
        return create_text_blocks(name, config, tokenizer, length, cache, once)
