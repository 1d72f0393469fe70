"""Adapted layers against the formula and PEFT's layers: outputs, gradients, what they save."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.module.lora import convert_linear_layer_to_lora, convert_lora_to_linear_layer
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRAEmbedding, LoRALinear
from tests.helpers.rounding import DIFFERENT, GRADIENTS, LOGITS

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


class Net(nn.Module):
    """Every kind of layer that carries adapters."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.linear = nn.Linear(8, 6)
        self.conv = Conv1D(5, 6)
        self.bare = nn.Linear(5, 7, bias=False)
        nn.init.normal_(self.conv.weight)
        nn.init.normal_(self.conv.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bare(torch.tanh(self.conv(torch.tanh(self.linear(self.table(ids))))))


NAMES = ("table", "linear", "conv", "bare")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 0]])


def ours_and_peft(options: dict) -> tuple[nn.Module, nn.Module, dict[str, tuple]]:
    """The same network with our adapters and with PEFT's, equal random values in both.

    Returns:
        Both, and by name of ours the pair of parameters (ours, PEFT's).
    """
    torch.manual_seed(0)
    net = Net()
    config = LoraConfig(
        lora_dim=3, lora_alpha=7.0, lora_module_name=("all-linear", "table"), **options
    )
    ours = convert_linear_layer_to_lora(copy.deepcopy(net), config)
    peft_config = PeftConfig(r=3, lora_alpha=7, target_modules=list(NAMES), **options)
    theirs = inject_adapter_in_model(peft_config, net)
    pairs = {}
    for name in NAMES:
        layer, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(layer, LoRAEmbedding):
            of_peft = {"lora_embedding_A": other.lora_embedding_A["default"]}
            of_peft["lora_embedding_B"] = other.lora_embedding_B["default"]
        else:
            of_peft = {"lora_A": other.lora_A["default"].weight}
            of_peft["lora_B"] = other.lora_B["default"].weight
        if options.get("use_dora"):
            of_peft["lora_magnitude"] = other.lora_magnitude_vector["default"].weight
        assert layer.adapter.keys() == of_peft.keys()
        for leaf, parameter in of_peft.items():
            mine = layer.adapter[leaf]
            assert mine.shape == parameter.shape
            if leaf == "lora_magnitude":  # both have measured the rows' lengths
                torch.testing.assert_close(mine, parameter.view_as(mine))
            with torch.no_grad():
                mine += torch.randn(mine.shape) * 0.5
                parameter.copy_(mine)
            pairs[f"{name}.{leaf}"] = (mine, parameter)
    return ours, theirs, pairs


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind: str):
    ours, theirs, pairs = ours_and_peft(KINDS[kind])
    y, expected = ours(IDS), theirs(IDS)
    torch.testing.assert_close(y, expected, rtol=0, atol=2 * LOGITS)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, (mine, parameter) in pairs.items():
        assert mine.grad.abs().max() > DIFFERENT, name
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=GRADIENTS, atol=LOGITS, msg=name)
    frozen = [p for n, p in ours.named_parameters() if "lora_" not in n]
    assert len(frozen) == 6 and all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_computes_the_same(kind: str):
    ours, theirs, _ = ours_and_peft(KINDS[kind])
    expected = ours(IDS)
    plain = convert_lora_to_linear_layer(ours)
    assert [type(m) for m in plain.children()] == [nn.Embedding, nn.Linear, Conv1D, nn.Linear]
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=2 * LOGITS)
    for name in NAMES:
        getattr(theirs, name).merge()
        weight = getattr(theirs, name).base_layer.weight
        torch.testing.assert_close(getattr(plain, name).weight, weight, rtol=0, atol=2 * LOGITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_starts_as_the_base_bit_for_bit(kind: str, init: str, dtype: torch.dtype):
    torch.manual_seed(0)
    net = Net().to(dtype)
    config = LoraConfig(3, lora_init=init, lora_module_name=("all-linear", "table"), **KINDS[kind])
    adapted = convert_linear_layer_to_lora(copy.deepcopy(net), config)
    if "dora" in kind:  # the rescaling stands between product and bias
        adapted.linear.bias.zero_()
        adapted.conv.bias.zero_()
        net.linear.bias.zero_()
        net.conv.bias.zero_()
    assert torch.equal(adapted(IDS), net(IDS))
    assert not adapted.table.lora_embedding_A.any() and adapted.table.lora_embedding_B.any()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
def test_matmul_has_the_gradients_of_the_formula(transposed: bool, bias: bool):
    """Numerically, in float64: gradients of x, A and B."""
    torch.manual_seed(0)
    base = (Conv1D(5, 4) if transposed else nn.Linear(4, 5)).double()
    nn.init.normal_(base.weight)
    layer = LoRALinear(base, LoraConfig(2, lora_alpha=3.0))
    layer.weight.requires_grad_(False)
    layer.bias = nn.Parameter(torch.randn(5).double(), requires_grad=False) if bias else None
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    weight = layer.weight.T if transposed else layer.weight
    y = x @ weight.T + (layer.bias if bias else 0) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), y)
    assert torch.autograd.gradcheck(through, (x, layer.lora_A, layer.lora_B))


def test_nothing_is_kept_that_the_gradients_do_not_need():
    """Of 64 rows of 32: x itself, the (64, r) product and the parameters, and no more."""
    layer = LoRALinear(nn.Linear(32, 48), LoraConfig(lora_dim=2))
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(64, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    activations = [t for t in saved if t.data_ptr() not in own]
    assert sorted(t.numel() for t in activations) == [64 * 2, 64 * 32]
    assert x.data_ptr() in {t.data_ptr() for t in activations}
    saved.clear()
    layer.adapter_enabled = False
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.data_ptr() in own for t in saved)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_alpha_is_refused(alpha: float):
    with pytest.raises(UserError, match="lora_alpha"):
        LoraConfig(4, lora_alpha=alpha)
