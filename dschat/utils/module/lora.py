"""LoRA: y = x W^T + b + s * B A dropout(x), after Hu et al. 2021 (arXiv:2106.09685).

The names are the paper's: `lora_A` is (r, in) and is applied first, `lora_B` is (out, r). The layer
keeps `weight` and `bias` under the names of the layer it replaces, so that a state dict without its
`lora_` entries is the base model's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.zero import full_shape, gathered

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("lm_head", "embed_out", "v_head", "reward_head", "score")


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: rank, scaling, dropout, initialisation and the layers that carry it."""

    dim: int
    alpha: float | None = None  # None: alpha = dim, a scaling of 1
    dropout: float = 0.0
    init: str = "A"  # the matrix that starts random; the other starts at zero
    use_rslora: bool = False
    module_names: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self):
        if self.dim < 1:
            raise UserError(f"lora_dim is {self.dim}: give a rank of at least 1")
        if self.init not in ("A", "B"):
            raise UserError(f"lora_init is {self.init!r}: choose A or B")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora_dropout is {self.dropout}: give a share in [0, 1)")

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv:2312.03732)."""
        alpha = self.dim if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)


class LoRALinear(nn.Module):
    """A linear layer (or GPT-2's Conv1D) with a frozen weight and a trainable low-rank update."""

    def __init__(self, base: nn.Linear | Conv1D, config: LoraConfig):
        super().__init__()
        self.transposed = isinstance(base, Conv1D)  # Conv1D stores (in, out)
        shape = full_shape(base.weight)
        self.in_features, self.out_features = shape if self.transposed else reversed(shape)
        self.scaling = config.scaling
        self.init = config.init
        self.adapter_enabled = True
        self.weight, self.bias = base.weight, base.bias
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(config.dim, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.dim, **like))
        self.reset_adapter()
        self.train(base.training)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Random A uniform in ±1/sqrt(in), or random B of variance 1/r; the other matrix zero."""
        if self.init == "A":
            bound = 1.0 / math.sqrt(self.in_features)
            self.lora_A.uniform_(-bound, bound)
            self.lora_B.zero_()
        else:
            self.lora_A.zero_()
            self.lora_B.normal_(std=1.0 / math.sqrt(self.lora_B.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight.t() if self.transposed else self.weight
        y = F.linear(x, weight, self.bias)
        if not self.adapter_enabled:
            return y
        return y + F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scaling

    def extra_repr(self) -> str:
        """Shapes and scaling, as `print(model)` shows them."""
        rank = full_shape(self.lora_B)[1]
        return f"in={self.in_features}, out={self.out_features}, r={rank}, s={self.scaling:g}"


def merged_weight(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, layer: LoRALinear
) -> torch.Tensor:
    """W + s * B A, computed in fp32 on a copy and cast once to the weight's dtype."""
    delta = (lora_B.float() @ lora_A.float()) * layer.scaling
    return (weight.float() + (delta.t() if layer.transposed else delta)).to(weight.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its full name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def match_layers(model: nn.Module, module_names: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that adapters go on; never the output head under `all-linear`.

    Args:
        model: any module; only names, types and identity are looked at, so `meta` will do.
        module_names: substrings of full layer names, or `all-linear`.

    Raises:
        UserError: nothing matches (the message lists what could), or a match shares its weight with
            the embeddings, where a merged update could not be stored.
    """
    heads = {id(_output_head(m)) for m in model.modules()} - {id(None)}
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    modules = dict(model.named_modules())
    body = [n for n in linear if n.split(".")[-1] not in HEAD_NAMES and id(modules[n]) not in heads]
    if tuple(module_names) == (ALL_LINEAR,):
        matched = body
    else:
        matched = [n for n in linear if any(part in n for part in module_names)]
    if not matched:
        leaves = ", ".join(sorted({n.split(".")[-1] for n in body})) or "none"
        example = f" (a full name: {body[0]})" if body else ""
        raise UserError(
            f"lora_module_name {' '.join(module_names)!r} matches no linear layer: use all-linear, "
            f"or part of a layer's name; this model's layers are {leaves}{example}"
        )
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    tied = [n for n in matched if id(modules[n].weight) in embeddings]
    if tied:
        raise UserError(
            f"lora_module_name {' '.join(module_names)!r} matches {tied[0]}, whose weight is also "
            "the input embedding: name other layers, or use all-linear"
        )
    return matched


def _output_head(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    return getter() if getter is not None else None


def convert_linear_layer_to_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put an adapter on every matching linear layer, in place, and freeze what it wraps."""
    for name in match_layers(model, config.module_names):
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = LoRALinear(getattr(parent, name.rpartition(".")[2]), config)
        for frozen in (layer.weight, layer.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        setattr(parent, name.rpartition(".")[2], layer)
    return model


def only_optimize_lora_parameters(model: nn.Module) -> nn.Module:
    """Leave only adapters and a reward or value head trainable."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_(parts[-1].startswith("lora_") or "v_head" in parts)
    return model


def make_model_gradient_checkpointing_compatible(model: nn.Module) -> nn.Module:
    """Turn on gradient checkpointing so that adapters behind a frozen embedding get gradients.

    Non-reentrant checkpointing gives them whether or not the block's input requires a gradient;
    the reentrant kind would skip every block below the first trainable one.
    """
    for module in model.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            module.activation_checkpointing_enable({"use_reentrant": False})
            return model
    raise UserError(f"{type(model).__name__} has no gradient checkpointing: drop the flag")


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes exactly what its base computes."""
    layers = list(lora_layers(model).values())
    before = [layer.adapter_enabled for layer in layers]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled


@contextlib.contextmanager
def fused_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are folded into the weights; afterwards the base is back bit for bit.

    Adapters that are disabled stay out. A copy of every weight is kept for the way back. Not for
    ZeRO-3 shards.
    """
    layers = {n: layer for n, layer in lora_layers(model).items() if layer.adapter_enabled}
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            fused = merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer)
            layer.weight.copy_(fused)
    try:
        with adapters_disabled(model):
            yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])


def merged_state_dict(
    state: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """A consolidated state dict with its adapters merged away; the live model is not touched."""
    merged = {n: t for n, t in state.items() if not n.split(".")[-1].startswith("lora_")}
    for name, layer in lora_layers(model).items():
        weight, lora_A, lora_B = (state[f"{name}.{k}"] for k in ("weight", "lora_A", "lora_B"))
        merged[f"{name}.weight"] = merged_weight(weight, lora_A, lora_B, layer)
    return merged


@torch.no_grad()
def convert_lora_to_linear_layer(model: nn.Module) -> nn.Module:
    """Replace adapted layers by plain ones with the merged weight, in place (also under ZeRO-3)."""
    for name, layer in lora_layers(model).items():
        parent = model.get_submodule(name.rpartition(".")[0])
        with gathered([layer.weight, layer.lora_A, layer.lora_B], modifier_rank=0):
            layer.weight.copy_(merged_weight(layer.weight, layer.lora_A, layer.lora_B, layer))
        with torch.device("meta"):
            if layer.transposed:
                plain = Conv1D(layer.out_features, layer.in_features)
            else:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight, plain.bias = layer.weight, layer.bias
        setattr(parent, name.rpartition(".")[2], plain)
    return model
