"""Frozen weights in 4 and 8 bits: the layer is the layer of its de-quantised weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.flops import Matrices
from dschat.utils.module.lora import (
    adapters_disabled,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    fused_adapters,
    lora_layers,
    merged_state_dict,
    only_optimize_lora_parameters,
)
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRALinear
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.module.targets import left_without_adapter
from dschat.utils.optim import get_optimizer_grouped_parameters, group_table
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers import tiny
from tests.helpers.rounding import DIFFERENT, LOGITS

pytest.importorskip("bitsandbytes")
BITS = ("4bit", "8bit")
# Largest error of a weight as a share of the largest in its block or row: half of NF4's widest gap
# (0.28 of the range between -1 and -0.72), half of 1/127.
WORST = {"4bit": 0.16, "8bit": 0.005}


ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def base_layer(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = Conv1D(96, 64) if kind == "conv1d" else nn.Linear(64, 96, bias=kind == "linear")
    nn.init.normal_(layer.weight)
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "bare", "conv1d"])
@pytest.mark.parametrize("bits", BITS)
def test_layer_is_that_of_its_dense_weight(bits: str, kind: str, options: dict, dtype):
    base = base_layer(kind, dtype)
    layer = QuantizedLoRALinear(base, LoraConfig(4, lora_alpha=8.0, quantize_base=bits, **options))
    dense = copy.deepcopy(base)
    dense.weight.data = layer.dense_weight().clone()
    error = (dense.weight.data - base.weight.data).float().abs().max()
    assert 0 < error <= WORST[bits] * base.weight.float().abs().max()
    twin = LoRALinear(dense, LoraConfig(4, lora_alpha=8.0, **options))
    x = torch.randn(3, 5, 64, dtype=dtype)
    assert distance(layer.eval()(x), twin.eval()(x)) <= ROUNDING[dtype]
    assert distance(layer(x), base(x)) > 10 * ROUNDING[dtype] or bits == "8bit"
    nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        for name, parameter in layer.adapter.items():
            twin.adapter[name].copy_(parameter)
    grads = []
    for one in (layer.train(), twin.train()):
        torch.manual_seed(1)  # of dropout
        inputs = x.clone().requires_grad_(True)
        y = one(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        grads.append([y, inputs.grad, *(p.grad for p in one.adapter.values())])
    for ours, expected in zip(*grads, strict=True):
        assert distance(ours, expected) <= ROUNDING[dtype]
    assert layer.bias is None or layer.bias.grad is None


@pytest.mark.parametrize("bits", BITS)
def test_weights_take_their_bits_and_nothing_dense_is_kept(bits: str):
    layer = QuantizedLoRALinear(base_layer("linear"), LoraConfig(4, quantize_base=bits))
    assert layer.packed.nbytes == 64 * 96 * (0.5 if bits == "4bit" else 1)
    assert set(layer.state_dict()) == {"bias", "lora_A", "lora_B"}
    saved: list[torch.Tensor] = []
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert max(t.numel() for t in saved) == 7 * 64
    assert "8bit" in repr(layer) or "4bit" in repr(layer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_model_merges_into_what_it_computes(name: str, bits: str):
    plain = tiny.ARCHITECTURES[name]()
    model = tiny.adapted(copy.deepcopy(plain), lora_alpha=8.0, quantize_base=bits)
    ids, mask = tiny.padded(tiny.token_rows(3, seed=4))
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    ours = model(**inputs).logits
    with fused_adapters(model):  # quantised weights stay as they are
        assert torch.equal(model(**inputs).logits, ours)
    with adapters_disabled(model):
        assert not torch.allclose(model(**inputs).logits, ours, atol=DIFFERENT)
    merged = merged_state_dict(model.state_dict(), model)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(**inputs).logits, ours, rtol=0, atol=2 * LOGITS)
    with pytest.raises(UserError, match="quantised weight cannot be merged in place"):
        convert_lora_to_linear_layer(model)


def test_start_table_counts_packed_weights():
    plain = tiny.tiny_llama()
    total = sum(p.numel() for p in plain.parameters())
    model = tiny.adapted(plain, quantize_base="4bit")
    groups = get_optimizer_grouped_parameters(model, OptimizerConfig(1e-3))
    adapters = sum(p.numel() for g in groups for p in g["params"])
    assert f"of {total + adapters:,} parameters" in group_table(groups, model, "")


def test_only_what_carries_adapters_is_packed():
    model = convert_linear_layer_to_lora(
        tiny.tiny_llama(),
        LoraConfig(4, quantize_base="4bit", lora_module_name=("q_proj", "embed_tokens")),
    )
    kinds = {name: type(layer).__name__ for name, layer in lora_layers(model).items()}
    assert set(kinds.values()) == {"QuantizedLoRALinear", "LoRAEmbedding"}
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    # Of 2 layers of 2 · 32² + 2 · 16 · 32 in attention and 3 · 32 · 48 beside it, q is 32².
    lora = LoraConfig(4, lora_module_name=("q_proj",))
    (line,) = left_without_adapter(only_optimize_lora_parameters(model), lora)
    assert f"leaves {2 * (1024 + 1024 + 3 * 32 * 48):,} parameters (86.7 % " in line
    with pytest.raises(UserError, match="quantize_base is 3bit"):
        LoraConfig(4, quantize_base="3bit")


def test_packed_weights_are_counted_as_they_multiply():
    plain = tiny.tiny_llama()
    expected = Matrices.of(plain, plain.config)
    packed = Matrices.of(tiny.adapted(plain, quantize_base="4bit"), plain.config)
    assert (packed.trunk, packed.attention) == (expected.trunk, expected.attention)
    assert packed.trained == packed.adapters
