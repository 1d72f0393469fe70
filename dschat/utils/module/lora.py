"""Adapters on a model: add, freeze the rest, switch off, fuse, merge.

`targets.py` chooses the layers, `lora_layers.py` computes them, `adapter*.py` know PEFT's files.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.module.fixed_update import (
    has_fixed_update,
    move_fixed_update,
    without_fixed_updates,
)
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRAEmbedding, LoRALayer, LoRALinear
from dschat.utils.module.lora_parameters import adapt_parameters
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.module.targets import fully_trained_modules, match_layers
from dschat.utils.module.token_rows import (
    TokenRows,
    fused_token_rows,
    merge_token_rows,
    token_rows,
    with_token_rows,
)
from dschat.utils.predecessor import changed, moved
from dschat.utils.zero import gathered


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Map full names to adapted layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


@changed("convert_linear_layer_to_lora(model, LoraConfig(lora_dim=16))", config=LoraConfig)
def convert_linear_layer_to_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put an adapter on every matching layer and bare weight, in place, and freeze what it wraps.

    With a `lora_dim` of 0 nothing happens.
    """
    if config.lora_dim == 0:
        return model
    bare: dict[str, list[str]] = {}  # module -> its adapted parameters
    for name in match_layers(model, config):
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if leaf in parent._parameters:
            bare.setdefault(parent_name, []).append(leaf)
            continue
        base = getattr(parent, leaf)
        layer = _adapted(base, config)
        move_fixed_update(base, layer)
        setattr(parent, leaf, layer)
    for name, leaves in bare.items():
        adapt_parameters(model.get_submodule(name), leaves, config)
    for layer in lora_layers(model).values():
        for leaf, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(leaf in layer.adapter)
    return model


def _adapted(base: nn.Linear | Conv1D | nn.Embedding, config: LoraConfig) -> LoRALayer:
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding(base, config)
    return (LoRALinear if config.quantize_base is None else QuantizedLoRALinear)(base, config)


@changed("only_optimize_lora_parameters(model, modules_to_save=[...])")
def only_optimize_lora_parameters(
    model: nn.Module, modules_to_save: Iterable[str] = ()
) -> nn.Module:
    """Freeze everything but adapters, a reward or value head, and `modules_to_save`."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_(parts[-1].startswith("lora_") or "v_head" in parts)
    for name in fully_trained_modules(model, modules_to_save):
        model.get_submodule(name).requires_grad_(True)
    return model


def make_model_gradient_checkpointing_compatible(model: nn.Module) -> nn.Module:
    """Turn on gradient checkpointing so that adapters after a frozen embedding get gradients.

    Non-reentrant checkpointing gives them whether or not the block's input requires a gradient;
    the reentrant kind would skip every block below the first trainable one.

    Raises:
        UserError: the model has no gradient checkpointing.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            module.activation_checkpointing_enable({"use_reentrant": False})
            return model
    raise UserError(
        f"{type(model).__name__} has no gradient checkpointing: leave gradient_checkpointing out"
    )


def adapted_layers(model: nn.Module) -> list[LoRALayer | TokenRows]:
    """List everything that `adapters_disabled` switches off."""
    return [*lora_layers(model).values(), *token_rows(model).values()]


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off inside the block: the model computes what its base computes."""
    layers = adapted_layers(model)
    before = [layer.adapter_enabled for layer in layers]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled


def shared_weights(model: nn.Module) -> set[int]:
    """Collect identities of the weights that several modules use, such as tied embeddings."""
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {identity for identity, count in users.items() if count > 1}


def _fusible(model: nn.Module) -> list[LoRALayer]:
    shared = shared_weights(model)
    return [
        layer
        for layer in lora_layers(model).values()
        if layer.adapter_enabled
        and not isinstance(layer, QuantizedLoRALinear)
        and not any(id(layer.get_parameter(leaf)) in shared for leaf in layer.adapted)
    ]


def fused_bytes(model: nn.Module) -> int:
    """Count the bytes of the copies that `fused_adapters` keeps."""
    weights = [layer.get_parameter(leaf) for layer in _fusible(model) for leaf in layer.adapted]
    return sum(weight.numel() * weight.element_size() for weight in weights)


@contextlib.contextmanager
def fused_adapters(model: nn.Module) -> Iterator[None]:
    """Fuse adapters into the weights inside the block; after it the base is back bit for bit.

    Disabled adapters are left out; those on a quantised weight, or on one that another module uses
    as well, stay adapters. Every weight is copied meanwhile. Not for ZeRO-3 shards.
    """
    layers = _fusible(model)
    originals = []
    with torch.no_grad():
        for layer in layers:
            for leaf, merged in layer.merged(dict(layer.named_parameters(recurse=False))).items():
                weight = layer.get_parameter(leaf)
                originals.append((weight, weight.detach().clone()))
                weight.copy_(merged)
            layer.adapter_enabled = False
    try:
        with fused_token_rows(model):
            yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)
        for layer in layers:
            layer.adapter_enabled = True


def is_adapter_key(key: str) -> bool:
    """Return whether a state dict's key is an adapter's own tensor."""
    return key.split(".")[-1].startswith("lora_")


def merged_state_dict(
    state: Mapping[str, torch.Tensor], model: nn.Module, within: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return a consolidated state dict with adapters merged; the live model stays as it is.

    Of two tied weights only the one that carries an adapter changes: they are untied.

    Args:
        within: merge those of these modules alone (names of `merge_groups`), whose tensors `state`
            holds.
    """
    if within is None:
        modules = dict(model.named_modules(remove_duplicate=False))
    else:
        modules = {name: model.get_submodule(name) for name in within}
    state = with_token_rows(without_fixed_updates(state, modules), modules)
    merged = {key: tensor for key, tensor in state.items() if not is_adapter_key(key)}
    for name, layer in modules.items():
        if not isinstance(layer, LoRALayer):
            continue
        tensors = {leaf: state[f"{name}.{leaf}"] for leaf in layer.adapter}
        if isinstance(layer, QuantizedLoRALinear):  # its weight is in no state dict
            tensors["weight"] = layer.dense_weight().to(tensors["lora_A"].device)
        else:
            tensors |= {leaf: state[f"{name}.{leaf}"] for leaf in layer.adapted}
        merged |= {f"{name}.{leaf}": weight for leaf, weight in layer.merged(tensors).items()}
    return merged


def merge_groups(model: nn.Module) -> dict[str, list[str]]:
    """Map modules that merge something to the names of the parameters that it takes."""
    return {
        name: [f"{name}.{leaf}" for leaf, _ in module.named_parameters(remove_duplicate=False)]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (LoRALayer, TokenRows)) or has_fixed_update(module)
    }


@torch.no_grad()
def convert_lora_to_linear_layer(model: nn.Module) -> nn.Module:
    """Merge adapters and put the original kinds of layers back, in place (also under ZeRO-3).

    Raises:
        UserError: a weight is quantised, or shared with a module that would change with it.
    """
    shared = shared_weights(model)
    for name, layer in lora_layers(model).items():
        if isinstance(layer, QuantizedLoRALinear):
            raise UserError(f"{name}: a quantised weight cannot be merged in place; save the model")
        own = dict(layer.named_parameters(recurse=False))
        if any(id(own[leaf]) in shared for leaf in layer.adapted):
            raise UserError(
                f"{name}: its weight is tied to another module's, so that it cannot be merged in "
                "place; save the model instead, which unties the two"
            )
        with gathered(list(own.values()), modifier_rank=0):
            for leaf, weight in layer.merged(own).items():
                own[leaf].copy_(weight)
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(parent, leaf, layer.without_adapter())
    merge_token_rows(model)
    return model


__getattr__ = moved(
    __name__,
    {
        "LinearLayer_LoRA": "dschat.utils.module.lora_layers.LoRALinear",
    },
)
