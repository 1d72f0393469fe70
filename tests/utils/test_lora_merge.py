"""Adapters folded into weights: for a while, on a copy, for good."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dschat.utils.module.lora import (
    LoRALinear,
    adapters_disabled,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    fused_adapters,
    lora_layers,
    merged_state_dict,
)
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS

MODELS = {"llama": tiny.tiny_llama, "gpt2": tiny.tiny_gpt2, "opt": tiny.tiny_opt}
IDS, MASK = tiny.padded(tiny.token_rows(3, seed=4))


def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long()).logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fused_adapters_compute_the_same_and_go_without_a_trace(name: str):
    model = tiny.adapted(MODELS[name](), lora_alpha=8.0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ours = logits_of(model)
    with fused_adapters(model):
        torch.testing.assert_close(logits_of(model), ours, rtol=0, atol=2 * LOGITS)
        assert not any(layer.adapter_enabled for layer in lora_layers(model).values())
        with fused_adapters(model):  # folded in once, not twice
            torch.testing.assert_close(logits_of(model), ours, rtol=0, atol=2 * LOGITS)
    with pytest.raises(KeyError), fused_adapters(model):
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits_of(model), ours)
    with adapters_disabled(model):
        base = logits_of(model)
        with fused_adapters(model):
            assert torch.equal(logits_of(model), base)


def test_one_fused_layer_within_rounding():
    """A layer of 64: |y| about 1, fp32, so nothing but the last bits may differ."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64), LoraConfig(lora_dim=8))
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(16, 64)
    ours = layer(x)
    with fused_adapters(layer):
        assert (layer(x) - ours).abs().max() <= 1e-6 * ours.abs().max()


def test_merge_is_fp32_and_cast_once():
    """W = 1 and B A = 2^-8 + 2^-18, a little over half of bf16's step above 1, which is 2^-7.

    The sum is nearest to 1 + 2^-7. In bf16 B A alone would become 2^-8, and the sum, a tie, 1.
    """
    one = LoRALinear(nn.Linear(1, 1).bfloat16(), LoraConfig(lora_dim=2))
    with torch.no_grad():
        one.weight.fill_(1.0)
        one.lora_A.fill_(1.0)
        one.lora_B.copy_(torch.tensor([[2**-8, 2**-18]]))
        assert (one.weight + one.lora_B @ one.lora_A).item() == 1.0
    holder = nn.ModuleDict({"layer": one})
    merged = merged_state_dict(holder.state_dict(), holder)["layer.weight"]
    assert merged.dtype == torch.bfloat16 and merged.item() == 1 + 2**-7


def test_merge_of_bf16_weights_equals_fp32_by_hand_and_no_bf16_one():
    torch.manual_seed(0)
    model = convert_linear_layer_to_lora(
        tiny.tiny_llama().bfloat16(), LoraConfig(4, lora_alpha=12.0)
    )
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = merged_state_dict(state, model)
    naive_differs = 0
    for name in lora_layers(model):
        W, A, B = (state[f"{name}.{leaf}"] for leaf in ("weight", "lora_A", "lora_B"))
        by_hand = (W.float() + 3.0 * (B.float() @ A.float())).bfloat16()
        assert torch.equal(merged[f"{name}.weight"], by_hand)
        naive_differs += (W + 3.0 * (B @ A)).ne(by_hand).sum().item()
    assert naive_differs > 0
    assert not any("lora_" in key for key in merged)
    plain = tiny.tiny_llama().bfloat16()
    assert merged.keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_merging_leaves_the_live_module_as_it_was(name: str):
    model = tiny.adapted(MODELS[name]())
    before = copy.deepcopy(model)
    merged = merged_state_dict(model.state_dict(), model)
    for (key, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new), key
        assert old.requires_grad == new.requires_grad, key
    plain = MODELS[name]()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=0, atol=2 * LOGITS)


@pytest.mark.parametrize("name", MODELS)
def test_converting_back_gives_the_plain_architecture(name: str):
    model = tiny.adapted(MODELS[name]())
    ours, types = logits_of(model), [type(m) for m in MODELS[name]().modules()]
    convert_lora_to_linear_layer(model)
    assert [type(m) for m in model.modules()] == types
    assert model.state_dict().keys() == MODELS[name]().state_dict().keys()
    torch.testing.assert_close(logits_of(model), ours, rtol=0, atol=2 * LOGITS)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
