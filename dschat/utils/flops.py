"""Floating-point operations of a decoder, and the peak speed of the GPUs that compute them.

Two counts, never mixed:

- `calculate_flops` is the formula of the Megatron paper with the LoRA-aware activation factor, the
  figure that DeepSpeed-Chat prints. It knows layers, hidden size and vocabulary, nothing else.
- `training_flops`, `forward_flops` and `generation_flops` count the products of one model's
  matrices. They are the numerator of MFU, and `peak_tflops` is its denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.gpus import gpu_of_device
from dschat.utils.module.experts import bare_weights
from dschat.utils.module.lora_layers import LoRALinear
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.module.targets import HEAD_NAMES, output_head
from dschat.utils.zero import full_numel, full_shape

EXPERTS_PER_TOKEN = (  # what configs call it
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
    "top_k_experts",
)


def peak_tflops(device_name: str | None, dtype: torch.dtype) -> float | None:
    """Return a GPU's dense peak in TFLOPS for bf16, fp16 or fp32, or None where none is known."""
    gpu = gpu_of_device(device_name)
    if gpu is None:
        return None
    peaks = {torch.bfloat16: gpu.bf16, torch.float16: gpu.fp16, torch.float32: gpu.fp32}
    return peaks.get(dtype)


class HfSizes(NamedTuple):
    """The three sizes that the Megatron formula takes from a model's config."""

    num_layers: int
    hidden_size: int
    vocab_size: int


def get_hf_configs(hf_config: Any) -> HfSizes:
    """Return layers, hidden size and vocabulary size of a `transformers` config.

    Raises:
        UserError: the config names none of them.
    """
    return HfSizes(
        _size(hf_config, "num_hidden_layers", "n_layer", "num_layers"),
        _size(hf_config, "hidden_size", "n_embd"),
        _size(hf_config, "vocab_size"),
    )


def lora_overhead_factor(lora_dim: int, hidden_size: int) -> float:
    """Return k = 2 · lora_dim / hidden_size, an adapter's share of a square matrix's parameters.

    A (r, h) and B (h, r) hold 2rh parameters against h²; their weight gradients cost as much less.
    """
    if hidden_size <= 0:
        raise UserError(f"hidden_size {hidden_size}: give the model's width, at least 1")
    if lora_dim < 0:
        raise UserError(f"lora_dim {lora_dim}: give 0 for no LoRA, or a rank of at least 1")
    return 2 * lora_dim / hidden_size


def activation_factor(lora_dim: int, hidden_size: int, gradient_checkpointing: bool) -> float:
    """Return the cost of an optimizer step in forward passes: 3 or 4, less (1 − k) with LoRA.

    One pass forward, one for input gradients, one for weight gradients, and one more when
    checkpointing computes the forward twice. LoRA leaves k of the weight gradients.
    OPT-1.3B (hidden 2048) with lora_dim 128: k = 0.125, so 2.125, or 3.125 with checkpointing.
    """
    k = lora_overhead_factor(lora_dim, hidden_size)
    passes = 4.0 if gradient_checkpointing else 3.0
    return passes - (1 - k) if lora_dim > 0 else passes


def calculate_flops(
    checkpoint_activations_factor: float, batch_size: float, seq_length: float, hf_config: Any
) -> float:
    """Return FLOPs per iteration, 24·f·B·s·l·h²·(1 + s/6h + V/16lh), over all GPUs.

    With f = 4 this is equation 3 of the Megatron paper (arXiv:2104.04473): full-square attention,
    MLP of width 4h, all heads their own keys. B·s is the global number of tokens.
    """
    if min(checkpoint_activations_factor, batch_size, seq_length) <= 0:
        raise UserError(
            f"factor {checkpoint_activations_factor}, batch {batch_size}, length {seq_length}: "
            "FLOPs need all three above 0"
        )
    layers, hidden, vocab = get_hf_configs(hf_config)
    tokens = batch_size * seq_length
    correction = 1 + seq_length / (6 * hidden) + vocab / (16 * layers * hidden)
    return 24 * checkpoint_activations_factor * tokens * layers * hidden**2 * correction


@dataclass(frozen=True)
class Matrices:
    """Parameters of a decoder's matrices that a token meets, by the way they are computed with.

    Attributes:
        trunk: all but the head's, frozen or not. adapters: LoRA's A and B. head: the output head,
            tied or not (the lookup of an embedding costs nothing).
        trained: those of the three above that train.
        attention: heads · head_dim of all layers, which every pair of positions multiplies twice.
        mixture: of experts, so that several tokens meet more than one does.
    """

    trunk: int
    adapters: int
    head: int
    trained: int
    attention: int
    mixture: bool = False

    @classmethod
    def of(cls, model: nn.Module, hf_config: Any) -> Matrices | None:
        """Count a live model's, under ZeRO-3 too; None where more than these multiply.

        That is the case with convolutions, with experts of which the config does not say how many
        a token meets, and without attention heads.
        """
        sizes, trained, mixture = {"trunk": 0, "adapters": 0, "head": 0}, 0, False
        modules = dict(model.named_modules())
        output_heads = [output_head(m) for m in modules.values()]
        bare, active = bare_weights(modules), _size(hf_config, *EXPERTS_PER_TOKEN, default=0)
        for name, layer in modules.items():
            is_head = name.split(".")[-1] in HEAD_NAMES or layer in output_heads
            kind = "head" if is_head else "trunk"
            if isinstance(layer, QuantizedLoRALinear):
                sizes[kind] += layer.weight_numel
            of_layer = isinstance(layer, (nn.Linear, Conv1D, LoRALinear))
            for leaf, parameter in layer.named_parameters(recurse=False):
                is_adapter = leaf.startswith(("lora_A", "lora_B"))
                multiplies = is_adapter or f"{name}.{leaf}" in bare
                size = full_numel(parameter)
                if len(shape := full_shape(parameter)) > 2:
                    if not (multiplies and active):
                        return None
                    size, mixture = size // shape[0] * active, True
                if multiplies or (of_layer and leaf == "weight"):
                    sizes["adapters" if is_adapter else kind] += size
                    trained += size if is_adapter or parameter.requires_grad else 0
        _, hidden, _ = get_hf_configs(hf_config)
        attention = 0
        for of_layer in layer_configs(hf_config):
            heads = _size(of_layer, "num_attention_heads", "n_head", "num_heads", default=0)
            if heads == 0:
                return None
            attention += heads * _size(of_layer, "head_dim", default=hidden // heads)
        return cls(**sizes, trained=trained, attention=attention, mixture=mixture)


def layer_configs(hf_config: Any) -> list[Any]:
    """Return the text config as each layer has it: heads may differ among them (Gemma 4)."""
    if hasattr(hf_config, "get_text_config"):
        hf_config = hf_config.get_text_config()
    if getattr(hf_config, "is_heterogeneous", False):
        return list(hf_config.per_layer_config[:])
    return [hf_config] * _size(hf_config, "num_hidden_layers", "n_layer", "num_layers")


def causal_pairs(length: float) -> float:
    """Return how many (query, key) pairs a causal sequence of this length attends: n(n+1)/2."""
    return length * (length + 1) / 2


def forward_flops(
    m: Matrices, tokens: float, pairs: float, head_tokens: float, adapters: bool = True
) -> float:
    """Return the FLOPs of a forward pass over `tokens` that attend `pairs` positions.

    A product costs 2 FLOPs per parameter and token; `head_tokens` of the tokens go through the
    head, and without `adapters` they are off. Sliding windows count as full attention; element-wise
    work (norms, activations, softmax) is not counted.
    """
    trunk = m.trunk + (m.adapters if adapters else 0)
    return 2 * trunk * tokens + 4 * m.attention * pairs + 2 * m.head * head_tokens


def training_flops(m: Matrices, tokens: float, pairs: float) -> tuple[float, float]:
    """Return the FLOPs of one step's forward and backward pass; recomputation is not counted.

    Backward, a product costs as much again for the gradient of its input and, where its matrix
    trains, for that one's own.
    """
    forward = forward_flops(m, tokens, pairs, tokens)
    frozen = m.trunk + m.adapters + m.head - m.trained
    return forward, 2 * forward - 2 * frozen * tokens


def generation_flops(m: Matrices, prompt_tokens: float, new_tokens: float, samples: int) -> float:
    """Return the FLOPs of sampling `new_tokens` after `prompt_tokens` in all, with a KV cache.

    Forward only: every token passes the layers once, but for the last of each answer, which
    nothing follows; the head runs once per new token. Lengths enter the attention as their mean.
    """
    tokens = prompt_tokens + new_tokens - samples
    return forward_flops(m, tokens, samples * causal_pairs(tokens / samples), new_tokens)


def _size(config: Any, *names: str, default: int | None = None) -> int:
    if hasattr(config, "get_text_config"):  # beside a tower for images, say
        config = config.get_text_config()
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    if default is None:
        raise UserError(f"{type(config).__name__} has no {' or '.join(names)}: FLOPs need it")
    return default
