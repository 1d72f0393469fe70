"""PEFT's form of adapters on bare parameters (`target_parameters`): their names and layout.

PEFT wraps a module once for each of its adapted parameters, in their order. The last wrapper has
the module's own name, and each one inside it one `.base_layer` more. With experts, A lies in the
file as (experts · r, in) and B as (out, r · experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from dschat.utils.module.adapter import Update, stop_at
from dschat.utils.module.adapter_config import CONFIG_FILE, AdapterConfig
from dschat.utils.module.experts import is_plain_linear
from dschat.utils.module.lora_parameters import is_transposed
from dschat.utils.zero import full_shape

# In families whose experts were layers once, PEFT takes any layer of these names for an expert's.
# Such a layer is therefore written by the name of its weight, as a bare parameter.
TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def wrapper_names(module: str, count: int) -> list[str]:
    """Name PEFT's wrappers of a module's `count` adapted parameters, in the parameters' order."""
    return [module + ".base_layer" * inside for inside in reversed(range(count))]


def file_layout(leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """Lay out a trained tensor as in the file; `leaf` is its name in the layer."""
    if tensor.ndim == 3 and leaf.startswith("lora_A_"):  # (experts, r, in)
        return tensor.flatten(0, 1)
    if tensor.ndim == 3 and leaf.startswith("lora_B_"):  # (experts, out, r)
        return tensor.permute(1, 2, 0).flatten(1)
    return tensor


def placed_updates(
    model: nn.Module, config: AdapterConfig, updates: Mapping[str, Update], trunk: str
) -> dict[str, Update]:
    """Check the ranks of updates, and move those of bare parameters to the parameters' names.

    Args:
        updates: by PEFT's names, as in `model`, which may be on `meta` or in shards. trunk: where
            `model` is the trunk alone, its name in the adapter's model.

    Returns:
        By name of the layer, or of the bare parameter; there with the matrices of each expert.

    Raises:
        UserError: a targeted parameter without tensors, or a rank that is not the config's.
    """
    prefix, faults = f"{trunk}." if trunk else "", []
    placed = dict(updates)
    names = {name: prefix + name for name in updates}  # by which the config knows them
    for module_name, module in model.named_modules() if config.target_parameters else ():
        own = [f"{module_name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        targets = [name for name in own if config.targets_parameter(prefix + name)]
        wrappers = wrapper_names(module_name, len(targets))
        for name, wrapper in zip(targets, wrappers, strict=True):
            if names.pop(wrapper, None) is None:
                faults.append(f"missing {wrapper}.lora_A")
                continue
            scaling = config.of_layer(prefix + name).scaling
            update = replace(placed.pop(wrapper), scaling=scaling)
            if isinstance(module, nn.Linear) and is_plain_linear(module):
                place = module_name  # a layer after all
            else:
                place = name
                update = _of_parameter(update, module, full_shape(model.get_parameter(name)))
            placed[place], names[place] = update, prefix + name
    for name, full_name in names.items():
        stored, rank = placed[name].lora_A.shape[-2], config.of_layer(full_name).lora_dim
        if stored != rank:
            faults.append(f"{name} of rank {stored}, {CONFIG_FILE} says {rank}")
    stop_at(faults, f"adapter {config.name}: its tensors cannot be used")
    return placed


def _of_parameter(update: Update, module: nn.Module, shape: torch.Size) -> Update:
    """Give each expert its A and B, where the parameter has an axis of experts."""
    transposed = is_transposed(module, shape)
    if len(shape) != 3 or update.lora_A.shape[0] % shape[0] or update.lora_B.shape[1] % shape[0]:
        return replace(update, transposed=transposed)
    A = update.lora_A.unflatten(0, (shape[0], -1))
    B = update.lora_B.unflatten(1, (-1, shape[0])).permute(2, 0, 1)
    return replace(update, lora_A=A, lora_B=B, transposed=transposed)
