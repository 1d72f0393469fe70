"""LoRA layers: what they compute, where they go, what of them trains."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.models.reward_model import RewardModel
from dschat.utils.module.lora import (
    LoRALinear,
    adapters_disabled,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    lora_layers,
    make_model_gradient_checkpointing_compatible,
    merged_state_dict,
    only_optimize_lora_parameters,
)
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.targets import fully_trained_modules, match_layers
from tests.helpers import tiny
from tests.helpers.rounding import DIFFERENT, LOGITS, NEAR_ONE

MODELS = {"llama": tiny.tiny_llama, "gpt2": tiny.tiny_gpt2, "opt": tiny.tiny_opt}
IDS, MASK = tiny.padded(tiny.token_rows(3, seed=4))


def matched(model: nn.Module, names: tuple[str, ...], fully: tuple[str, ...] = ()) -> list[str]:
    return match_layers(model, LoraConfig(4, lora_module_name=names, modules_to_save=fully))


def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long()).logits


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("name", MODELS)
def test_starts_as_its_base_exactly(name: str, init: str):
    base = MODELS[name]()
    model = convert_linear_layer_to_lora(
        copy.deepcopy(base), LoraConfig(lora_dim=4, lora_init=init)
    )
    assert len(lora_layers(model)) >= 8
    assert torch.equal(logits_of(model), logits_of(base))


def test_layer_by_hand():
    """y = x W^T + b + s B A x with s = 6 / 2 = 3: (7 + 10) + 3 * 2 * (1 * 1 - 1 * 2) = 11."""
    base = nn.Linear(2, 1)
    layer = LoRALinear(base, LoraConfig(lora_dim=2, lora_alpha=6.0))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 3.0]]))
        base.bias.copy_(torch.tensor([10.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0], [5.0, 5.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0, 0.0]]))
    assert layer(torch.tensor([[1.0, 2.0]])).item() == 11.0


@pytest.mark.parametrize(
    ("alpha", "use_rslora", "scaling"),
    [(None, False, 1.0), (32.0, False, 2.0), (32.0, True, 8.0), (None, True, 2.0)],
)
def test_scaling(alpha: float | None, use_rslora: bool, scaling: float):
    """With r = 16: alpha / 16, or alpha / 4; alpha is r when not given, or 8 with rsLoRA."""
    assert LoraConfig(16, lora_alpha=alpha, use_rslora=use_rslora).scaling == scaling


@pytest.mark.parametrize("base", [nn.Linear(400, 50), Conv1D(50, 400)])
def test_initial_values(base: nn.Module):
    """A: uniform within ±1/sqrt(400) = ±0.05, whose deviation is 0.05/sqrt(3); B: variance 1/r."""
    torch.manual_seed(0)
    layer = LoRALinear(base, LoraConfig(lora_dim=64))
    assert layer.lora_A.shape == (64, 400) and layer.lora_B.shape == (50, 64)
    assert 0.0499 < layer.lora_A.abs().max().item() <= 0.05
    # Of 25,600 uniform draws the deviation is off by 0.45 / sqrt(25,600) = 0.3 %: four times that.
    assert layer.lora_A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.012)
    assert not layer.lora_B.any()
    layer = LoRALinear(base, LoraConfig(lora_dim=64, lora_init="B"))
    # Of 3,200 normal draws the variance is off by sqrt(2 / 3,200) = 2.5 %: 10 % is four times that.
    assert layer.lora_B.var().item() == pytest.approx(1 / 64, rel=0.1)
    assert not layer.lora_A.any()


def test_conv1d_computes_what_linear_does_on_its_transpose():
    torch.manual_seed(0)
    conv, linear = Conv1D(5, 3), nn.Linear(3, 5)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias.normal_())
    pair = [LoRALinear(base, LoraConfig(lora_dim=2, lora_alpha=3.0)) for base in (conv, linear)]
    with torch.no_grad():
        for layer in pair:
            layer.lora_A.copy_(torch.arange(6.0).view(2, 3))
            layer.lora_B.copy_(torch.arange(10.0).view(5, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(pair[0](x), pair[1](x), rtol=NEAR_ONE, atol=LOGITS)
    whole = nn.ModuleDict({"conv": pair[0], "linear": pair[1]})
    merged = merged_state_dict(whole.state_dict(), whole)
    torch.testing.assert_close(merged["conv.weight"], merged["linear.weight"].T)
    plain = convert_lora_to_linear_layer(whole)
    assert isinstance(plain["conv"], Conv1D) and isinstance(plain["linear"], nn.Linear)
    torch.testing.assert_close(plain["conv"](x), plain["linear"](x), rtol=NEAR_ONE, atol=LOGITS)


def test_dropout_acts_on_the_adapters_input_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8), LoraConfig(lora_dim=4, lora_dropout=0.5))
    x = torch.ones(200, 8)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)  # B is zero
    nn.init.ones_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    model = convert_linear_layer_to_lora(tiny.tiny_llama().eval(), LoraConfig(4, lora_dropout=0.5))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_every_layer_but_the_head(name: str):
    model = MODELS[name]()
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert set(matched(model, ("all-linear",))) == linear - {"lm_head"}


def test_all_linear_skips_the_reward_head_and_a_head_of_another_name():
    reward = RewardModel(tiny.tiny_llama().model)
    assert len(matched(reward, ("all-linear",))) == 14
    assert all(name.startswith("rwtransformer.") for name in matched(reward, ("all-linear",)))
    model = tiny.tiny_llama()
    model.exit = model.lm_head
    model.get_output_embeddings = lambda: model.exit
    del model.lm_head
    assert "exit" not in matched(model, ("all-linear",))


def test_substrings_choose_layers():
    model = tiny.tiny_llama()
    assert matched(model, ("q_proj",)) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert len(matched(model, ("layers.1.",))) == 7
    assert len(matched(model, ("q_proj", "layers.1."))) == 8
    assert matched(model, ("lm_head",)) == ["lm_head"]


def test_no_match_says_what_could():
    with pytest.raises(UserError) as caught:
        matched(tiny.tiny_gpt2(), ("decoder.layers.",))
    message = str(caught.value)
    assert "'decoder.layers.'" in message and "\n" not in message
    assert "c_attn, c_fc, c_proj" in message and "transformer.h.0.attn.c_attn" in message
    assert "lm_head" not in message


def test_embeddings_are_named_by_the_end_of_their_name():
    model = tiny.tiny_opt()
    table = "model.decoder.embed_tokens"
    assert matched(model, ("embed_tokens",)) == [table]
    assert set(matched(model, ("all-linear", "embed_tokens"))) == {
        table,
        *matched(model, ("all-linear",)),
    }
    assert table not in matched(model, ("decoder.",))  # a part of a name is a linear layer's
    with pytest.raises(UserError, match=r"embed_positions \(OPT.*modules_to_save"):
        matched(model, ("embed_positions",))  # adds an offset to its ids


def test_what_trains_whole_gets_no_adapter():
    model = tiny.tiny_llama()
    assert matched(model, ("q_proj", "lm_head"), ("lm_head",)) == matched(model, ("q_proj",))
    convert_linear_layer_to_lora(model, LoraConfig(4, modules_to_save=("norm", "layers.1.mlp")))
    only_optimize_lora_parameters(model, ("norm", "layers.1.mlp"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    mlp = {f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    assert trained == {"model.norm.weight", *mlp}
    assert len(lora_layers(model)) == 14 - 3
    with pytest.raises(UserError, match=r"modules_to_save 'norms' names no module.* norm"):
        fully_trained_modules(model, ("norms",))
    with pytest.raises(UserError, match="'score' names no module"):
        fully_trained_modules(model, ("score",))
    assert fully_trained_modules(tiny.reward_model(), ("score",)) == []  # it trains in any case


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dim": -1}, "lora_dim is -1"),
        ({"lora_init": "C"}, "lora_init is C"),
        ({"lora_dropout": 1.0}, "1.0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, words: str):
    with pytest.raises(UserError, match=words):
        LoraConfig(**{"lora_dim": 4, **options})


@pytest.mark.parametrize("name", MODELS)
def test_disabled_adapters_leave_the_base(name: str):
    base, model = MODELS[name](), tiny.adapted(MODELS[name]())
    ours = logits_of(model)
    assert not torch.allclose(ours, logits_of(base), atol=DIFFERENT)
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), logits_of(base))
        with adapters_disabled(model):
            assert torch.equal(logits_of(model), logits_of(base))
        assert torch.equal(logits_of(model), logits_of(base))
    assert torch.equal(logits_of(model), ours)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(logits_of(model), ours)


def test_only_adapters_and_the_head_train():
    model = convert_linear_layer_to_lora(RewardModel(tiny.tiny_opt().model), LoraConfig(4))
    only_optimize_lora_parameters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{n}.{leaf}" for n in lora_layers(model) for leaf in ("lora_A", "lora_B")}
    assert trained == adapters | {"v_head.weight"}
    assert len(adapters) == 2 * 2 * 6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "reward"])
def test_checkpointing_changes_no_gradient(kind: str):
    """Behind a frozen embedding too; that it is on shows in layers that run a second time."""

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny.adapted(MODELS["llama" if kind == "reward" else kind]())
        if kind == "reward":
            torch.manual_seed(2)
            model = only_optimize_lora_parameters(RewardModel(model.model))
        if checkpointing:
            make_model_gradient_checkpointing_compatible(model)
        model.train()
        runs = []
        first = next(iter(lora_layers(model).values()))
        first.register_forward_pre_hook(lambda *_: runs.append(1))
        if kind == "reward":
            model(IDS, MASK).square().sum().backward()
        else:
            logits_of(model).logsumexp(-1).square().mean().backward()
        assert len(runs) == (2 if checkpointing else 1)
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) >= 16
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)


def test_model_without_checkpointing_is_refused():
    with pytest.raises(UserError, match="Linear has no gradient checkpointing"):
        make_model_gradient_checkpointing_compatible(nn.Linear(2, 2))
    model = tiny.tiny_llama()
    model.supports_gradient_checkpointing = model.model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM has no gradient checkpointing"):
        make_model_gradient_checkpointing_compatible(model)


def test_without_a_rank_there_are_no_adapters():
    model = convert_linear_layer_to_lora(tiny.tiny_llama(), LoraConfig())
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_names_may_stand_apart_or_with_commas_between_them():
    config = LoraConfig(4, lora_module_name=("q_proj,v_proj", "fc"), modules_to_save=("norm,",))
    assert config.lora_module_name == ("q_proj", "v_proj", "fc")
    assert config.modules_to_save == ("norm",)
