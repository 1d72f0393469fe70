"""Flags of one model: sharding, learning rates, adapters."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.settings import Settings, group, setting
from dschat.utils.ds_utils import ZERO_STAGES
from dschat.utils.module.lora_layers import LoraConfig
from dschat.utils.optim import OptimizerConfig


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Settings of loading, sharding and training one model."""

    zero_stage: int = setting(0, "ZeRO stage", choices=ZERO_STAGES)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")
    dropout: float | None = setting(None, "override every dropout probability", at_least=0, below=1)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    lora: LoraConfig = group(LoraConfig)
