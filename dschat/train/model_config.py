"""Settings of training one model, and what they do to it before an engine is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dschat.models.causal_lm import load_config
from dschat.settings import Settings, group, setting
from dschat.utils.ds_utils import ZERO_STAGES
from dschat.utils.module.lora import (
    convert_linear_layer_to_lora,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.targets import match_layers
from dschat.utils.optim import OptimizerConfig


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Settings of loading, sharding and training one model.

    Attributes:
        train_base: with adapters, train what they wrap as well; no flag, the run decides.
    """

    zero_stage: int = setting(0, "ZeRO stage", choices=ZERO_STAGES)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")
    dropout: float | None = setting(None, "override every dropout probability", at_least=0, below=1)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    lora: LoraConfig = group(LoraConfig)
    train_base: bool = False

    @property
    def base_is_frozen(self) -> bool:
        """Tell whether switching the adapters off restores the model that training started from."""
        return self.lora.lora_dim > 0 and not self.train_base and not self.lora.modules_to_save

    def check(
        self, model_name_or_path: str, build: Callable[[PretrainedConfig], nn.Module]
    ) -> None:
        """Stop when no layer would get an adapter; builds the model on `meta`, without weights."""
        config = load_config(model_name_or_path)
        with torch.device("meta"):
            module = build(config)
        if self.lora.lora_dim:
            match_layers(module, self.lora)

    def apply(self, module: nn.Module) -> nn.Module:
        """Add adapters, freeze the base, switch gradient checkpointing on, all in place."""
        if self.lora.lora_dim:
            convert_linear_layer_to_lora(module, self.lora)
            if self.train_base:
                module.requires_grad_(True)
            else:
                only_optimize_lora_parameters(module, self.lora.modules_to_save)
        if self.gradient_checkpointing:
            make_model_gradient_checkpointing_compatible(module)
        return module
