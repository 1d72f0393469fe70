"""Settings of training one model, and what they do to it before an engine is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from dschat.errors import UserError
from dschat.models.causal_lm import load_config
from dschat.settings import Settings, group, setting
from dschat.train.disk import ModelSize
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
    ) -> ModelSize:
        """Stop at adapters that do not fit the model, built on `meta`, without weights.

        Raises:
            UserError: no layer would get an adapter, or each would get one of too high a rank.
        """
        config = load_config(model_name_or_path)
        with torch.device("meta"):
            module = build(config)
            base = sum(parameter.numel() for parameter in module.parameters())
            if self.lora.lora_dim:
                self._check_rank(module)
                self._add_adapters(module, replace(self.lora, quantize_base=None))
        return ModelSize.of(module, base)

    def _check_rank(self, module: nn.Module) -> None:
        """Stop at a rank that no adapted layer has itself, so that B A could not reach it."""
        modules = dict(module.named_modules())
        ranks = {name: min(modules[name].weight.shape) for name in match_layers(module, self.lora)}
        name = max(ranks, key=ranks.__getitem__)
        if self.lora.lora_dim > ranks[name]:
            raise UserError(
                f"lora_dim {self.lora.lora_dim}: no adapted layer has a rank above "
                f"{ranks[name]} ({name}), so a larger adapter adds nothing; give at most that"
            )

    def apply(self, module: nn.Module) -> nn.Module:
        """Add adapters, freeze the base, switch gradient checkpointing on, all in place."""
        if self.lora.lora_dim:
            self._add_adapters(module, self.lora)
        if self.gradient_checkpointing:
            make_model_gradient_checkpointing_compatible(module)
        return module

    def _add_adapters(self, module: nn.Module, lora: LoraConfig) -> None:
        convert_linear_layer_to_lora(module, lora)
        if self.train_base:
            module.requires_grad_(True)
        else:
            only_optimize_lora_parameters(module, lora.modules_to_save)
