"""Adapters on experts and routers: weights that belong to no layer of torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import moe

from dschat.errors import UserError
from dschat.utils.module import lora_parameters
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
from dschat.utils.module.low_rank_weight import LowRankWeight
from dschat.utils.module.targets import left_without_adapter, match_layers
from dschat.utils.optim import build_optimizer, get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers.adapters import as_trained, assert_equal, logits_of, with_adapter
from tests.helpers.rounding import DIFFERENT, NEAR_ONE
from tests.helpers.tiny import MOE, tiny_falcon, tiny_llama, tiny_moe

LORA = LoraConfig(lora_dim=3, lora_alpha=6.0)  # 3: grouped kernels want multiples of 8
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
WAYS = [(name, way) for name in ("mixtral", "gpt_oss") for way in IMPLEMENTATIONS]
WAYS += [("qwen3_moe", "grouped_mm"), ("olmoe", "grouped_mm"), ("llama4_text", None)]


def model_of(name: str, way: str | None) -> torch.nn.Module:
    model = tiny_moe(name)
    if way is not None:
        model.set_experts_implementation(way)
    return model


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_experts_compute_their_merged_weights(name: str, way: str | None):
    """The base at the start and disabled; live, fused, merged and converted back the same."""
    model = model_of(name, way)
    base, before = logits_of(model), {k: t.clone() for k, t in model.state_dict().items()}
    convert_linear_layer_to_lora(model, LORA)
    assert torch.equal(logits_of(model), base)
    as_trained(only_optimize_lora_parameters(model))
    live = logits_of(model)
    assert not torch.allclose(live, base, atol=DIFFERENT)
    with fused_adapters(model):
        assert_equal(logits_of(model), live)
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), base)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    plain = model_of(name, way)
    plain.load_state_dict(merged_state_dict(state, model))
    assert_equal(logits_of(plain), live)
    kinds = [type(m) for m in plain.modules()]
    assert [type(m) for m in convert_lora_to_linear_layer(model).modules()] == kinds
    assert model.state_dict().keys() == before.keys()
    assert_equal(logits_of(model), live)


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_sum(monkeypatch: pytest.MonkeyPatch, way: str):
    """A and B of every expert, and of no expert that no token met."""
    model = with_adapter(model_of("mixtral", way), LORA)
    ids = torch.tensor([[7, 8, 9]])
    model(ids).logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if "experts.lora" in n}
    routed = []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda _, __, out: routed.extend(out[2].unique().tolist()))
    model.zero_grad()
    monkeypatch.setattr(lora_parameters, "multiplies_by_torch", lambda _: False)  # the sum itself
    model(ids).logits.square().sum().backward()
    assert len(found) == 2 * 2 * 2
    for name, parameter in model.named_parameters():
        if name in found:
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(found[name] / scale, parameter.grad / scale)
            if ".1.mlp" in name:
                met = [e for e in range(4) if found[name][e].any()]
                assert met == sorted(routed) != [0, 1, 2, 3]


def test_zero_3s_linear_gets_the_sum(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed puts an autograd function in F.linear's place; it would drop the gradients."""
    model = with_adapter(model_of("mixtral", "eager"), LORA)
    expected = logits_of(model)
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    assert_equal(logits_of(model), expected)
    model(torch.tensor([[7, 8, 9]])).logits.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = ("view", "transpose", "t", "expand", "detach", "alias", "select", "unbind", "slice")
        if function.overloadpacket._qualified_op_name.split("::")[1] not in views:
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                size = tensor.numel() if isinstance(tensor, torch.Tensor) else 0
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_no_tensor_is_as_large_as_the_experts(monkeypatch: pytest.MonkeyPatch, way: str):
    """Forward and backward, one token at a time: the update is never a tensor of its own."""
    model = tiny_moe("mixtral", num_hidden_layers=1, intermediate_size=64)
    model.set_experts_implementation(way)
    experts = with_adapter(model, LoraConfig(lora_dim=2)).model.layers[0].mlp.experts
    with Largest() as largest:
        experts(torch.ones(1, 32), torch.tensor([[0, 2]]), torch.ones(1, 2)).sum().backward()
    smallest = experts.down_proj.numel()
    assert 0 < largest.elements < smallest
    with Largest() as largest:
        monkeypatch.setattr(lora_parameters, "multiplies_by_torch", lambda _: False)
        experts(torch.ones(1, 32), torch.tensor([[0, 2]]), torch.ones(1, 2)).sum().backward()
    assert largest.elements >= smallest


def test_a_low_rank_weight_is_its_sum():
    torch.manual_seed(0)
    W, P, Q = torch.randn(3, 6, 8), torch.randn(3, 6, 2), torch.randn(3, 2, 8)
    weight, dense = LowRankWeight(W, P, Q, 0.5), W + 0.5 * P @ Q
    x, ids, ends = torch.randn(5, 8), torch.tensor([0, 2, 2, 1, 0]), torch.tensor([1, 1, 5])
    close = torch.testing.assert_close
    close(F.linear(x, weight[1], torch.ones(6)), x @ dense[1].T + 1)
    close(F.linear(x, weight[torch.tensor(2)]), x @ dense[2].T)
    close(x @ weight.mT[0], x @ dense[0].T)
    close(x @ weight[0].T, x @ dense[0].T)
    close(torch.bmm(weight[ids], x[:, :, None]), torch.bmm(dense[ids], x[:, :, None]))
    close(weight[0] @ x.T, dense[0] @ x.T)
    offsets = ends.int()
    close(moe._grouped_linear(x, weight, offsets), moe._grouped_linear(x, dense, offsets))
    transposed = weight.transpose(1, 2)
    fallback = torch.ops.transformers.grouped_mm_fallback
    close(fallback(x, transposed, offsets), fallback(x, dense.mT, offsets))
    close(torch.einsum("eoi,ni->eno", weight, x), torch.einsum("eoi,ni->eno", dense, x))
    close(weight[1:], dense[1:])
    close(weight.sum(), dense.sum())
    close(weight.transpose(0, 1), dense.transpose(0, 1))


def names_of(name: str, *parts: str) -> set[str]:
    model = tiny_moe(name)
    matched = match_layers(model, LoraConfig(lora_dim=2, lora_module_name=parts))
    return {n.removeprefix("model.layers.1.") for n in matched if ".1." in n}


ATTENTION = {f"self_attn.{leaf}_proj" for leaf in "qkvo"}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_all_linear_takes_experts_and_routers():
    for name in ("mixtral", "qwen3_moe", "olmoe"):
        assert names_of(name, "all-linear") == {*ATTENTION, *EXPERTS, "mlp.gate.weight"}
    assert names_of("gpt_oss", "all-linear") == {*ATTENTION, *EXPERTS, "mlp.router.weight"}
    llama = names_of("llama4_text", "all-linear")
    assert {"feed_forward.router.weight", "feed_forward.experts.gate_up_proj"} < llama
    assert "feed_forward.router" not in llama  # a linear layer that does more than multiply
    falcon = match_layers(tiny_falcon(), LoraConfig(lora_dim=2))  # linear layers of its own make
    assert len(falcon) == 2 * 4 and not any(name.endswith(".weight") for name in falcon)
    shared = {f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")}
    shared.add("mlp.shared_expert_gate")
    qwen = {*ATTENTION, *EXPERTS, "mlp.gate.weight", *shared}
    assert names_of("qwen2_moe", "all-linear") == qwen


def test_parts_of_names_choose_experts():
    assert names_of("mixtral", "experts") == EXPERTS
    assert names_of("gpt_oss", "down_proj", "q_proj") == {
        "mlp.experts.down_proj",
        "self_attn.q_proj",
    }
    model = tiny_moe("mixtral")
    whole = ("model.layers.1.mlp",)
    lora = LoraConfig(lora_dim=2, lora_module_name=("experts",), modules_to_save=whole)
    assert {name.split(".")[2] for name in match_layers(model, lora)} == {"0"}
    with pytest.raises(UserError, match=r"linear layers are .*gate_up_proj.*weight"):
        match_layers(model, LoraConfig(lora_dim=2, lora_module_name=("w1",)))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"quantize_base": "4bit"}]
)
def test_what_experts_cannot_follow_is_refused(options: dict):
    (setting,) = options
    with pytest.raises(UserError, match=f"^{setting}: adapters on experts"):
        match_layers(tiny_moe("olmoe"), LoraConfig(lora_dim=2, **options))
    lora = LoraConfig(lora_dim=2, lora_module_name=("self_attn",), **options)
    assert len(match_layers(tiny_moe("olmoe"), lora)) == 8


def test_what_stays_without_adapters_is_said():
    model = tiny_moe("mixtral")
    lora = LoraConfig(lora_dim=2, lora_module_name=("self_attn",))
    with_adapter(model, lora)
    # Two layers, each with a router of 4 · 32 and 4 experts of 48 · 32 and 32 · 24.
    left, attention = 2 * (4 * 32 + 4 * (48 * 32 + 32 * 24)), 2 * (2 * 32 * 32 + 2 * 16 * 32)
    share = f"{100 * left / (left + attention):.1f} % of the matrices outside embeddings and head"
    assert left_without_adapter(model, lora) == [
        f"self_attn leaves {left:,} parameters ({share}) without adapters: mlp.gate, "
        "experts.gate_up_proj, experts.down_proj"
    ]
    for build in (lambda: tiny_moe("mixtral"), tiny_llama):
        assert left_without_adapter(with_adapter(build(), LORA), LORA) == []
    assert left_without_adapter(tiny_llama(), LoraConfig()) == []


def test_what_mambas_kernels_read_gets_no_adapter():
    """They take x_proj, dt_proj and out_proj as matrices; PEFT refuses the last of them."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    sizes["time_step_rank"] = 2
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    lora = LoraConfig(lora_dim=2)
    assert match_layers(model, lora) == ["backbone.layers.0.mixer.in_proj"]
    (line,) = left_without_adapter(with_adapter(model, lora), lora)
    assert line.endswith("mixer.A_log, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.out_proj")
    with pytest.raises(UserError, match="matches no layer"):
        match_layers(model, LoraConfig(lora_dim=2, lora_module_name=("out_proj",)))


def test_start_and_first_step_of_an_experts_matrices():
    """A from ±1/sqrt(in), or B of variance 1/r; with Adam B moves by ratio times A's rate."""
    model = tiny_moe("gpt_oss")
    convert_linear_layer_to_lora(only_optimize_lora_parameters(model), LoraConfig(lora_dim=8))
    experts = model.model.layers[0].mlp.experts
    A, B = experts.lora_A_gate_up_proj, experts.lora_B_gate_up_proj
    assert (A.shape, B.shape) == ((4, 8, 32), (4, 48, 8))  # the weight is (4, 32, 48)
    assert 0.95 < A.abs().max() * math.sqrt(32) <= 1 and not B.any()
    rates = OptimizerConfig(learning_rate=1e-3, loraplus_lr_ratio=16)
    groups = get_optimizer_grouped_parameters(model, rates)
    assert {g["name"]: (len(g["params"]), g["lr"]) for g in groups} == {
        "lora_A": (2 * 7, 1e-3),
        "lora_B": (2 * 7, 16e-3),
    }
    model(torch.arange(3, 60)[None]).logits.square().sum().backward()
    build_optimizer(groups, rates).step()
    moved = B.detach()[B.grad != 0].abs()
    assert moved.median().item() == pytest.approx(16e-3, rel=NEAR_ONE)
    other = tiny_moe("gpt_oss")
    convert_linear_layer_to_lora(other, LoraConfig(lora_dim=8, lora_init="B"))
    drawn = other.model.layers[0].mlp.experts.lora_B_down_proj
    # Of 4 * 32 * 8 normal draws the deviation is off by 1 / sqrt(2 * 1,024) = 2.2 %: 9 % is four
    # times that.
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(8), rel=0.09)


def test_every_family_keeps_the_names_of_its_weights():
    for name in MOE:
        model = tiny_moe(name)
        before = model.state_dict().keys()
        convert_linear_layer_to_lora(model, LORA)
        after = model.state_dict().keys()
        assert {key for key in after if ".lora_" not in key} == before
        weights = sum(len(layer.adapted) for layer in lora_layers(model).values())
        assert len(after) - len(before) == 2 * weights
