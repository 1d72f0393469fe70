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

Build = Callable[[PretrainedConfig], nn.Module]


def on_meta(model_name_or_path: str, build: Build) -> nn.Module:
    """Build the module of a model's config on `meta`, without weights."""
    config = load_config(model_name_or_path)
    with torch.device("meta"):
        return build(config)


def largest_rank(module: nn.Module, lora: LoraConfig) -> tuple[str, int]:
    """Find the layer of the highest rank among those that get adapters, and that rank."""
    modules = dict(module.named_modules())
    ranks = {name: min(modules[name].weight.shape) for name in match_layers(module, lora)}
    name = max(ranks, key=ranks.__getitem__)
    return name, ranks[name]


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

    def check(self, model_name_or_path: str, build: Build) -> ModelSize:
        """Stop at adapters that do not fit the model, built on `meta`, without weights.

        Raises:
            UserError: no layer would get an adapter, or each would get one of too high a rank.
        """
        module = on_meta(model_name_or_path, build)
        base = sum(parameter.numel() for parameter in module.parameters())
        if self.lora.lora_dim:
            name, rank = largest_rank(module, self.lora)
            if self.lora.lora_dim > rank:
                raise UserError(
                    f"lora_dim {self.lora.lora_dim}: no adapted layer has a rank above {rank} "
                    f"({name}), so a larger adapter adds nothing; give at most that"
                )
            with torch.device("meta"):
                self._add_adapters(module, replace(self.lora, quantize_base=None))
        return ModelSize.of(module, base)

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
