"""Groups, rates and schedules of LoRA+."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

from dschat.errors import UserError
from dschat.models.reward_model import RewardModel
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim import (
    build_optimizer,
    check_rates,
    get_optimizer_grouped_parameters,
    group_rates,
    group_table,
)
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import SCHEDULES, schedule_factory
from tests.helpers import tiny
from tests.helpers.rounding import FIGURE, NEAR_ONE, ROUNDING

IDS, MASK = tiny.padded(tiny.token_rows(4, seed=6))


def adapted_llama(**options: object) -> nn.Module:
    torch.manual_seed(3)
    model = convert_linear_layer_to_lora(tiny.tiny_llama(), LoraConfig(lora_dim=4, **options))
    return only_optimize_lora_parameters(model)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long(), labels=IDS).loss


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_opt])
def test_every_trainable_parameter_is_in_one_group(build):
    """Tied embeddings count once; all kinds of layer are in the model."""
    model = RewardModel(build().model if build is not tiny.tiny_gpt2 else build().transformer)
    convert_linear_layer_to_lora(model, LoraConfig(lora_dim=4))
    model.requires_grad_(True)
    groups = get_optimizer_grouped_parameters(model, OptimizerConfig(1e-3))
    assert [g["name"] for g in groups] == ["decay", "no_decay", "lora_A", "lora_B", "head"]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    groups = get_optimizer_grouped_parameters(build(), OptimizerConfig(1e-3))
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(build().parameters()))


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_opt])
def test_biases_and_norms_do_not_decay(build):
    """Told by hand from the names of these three: GPT-2's `ln_1.weight` says norm nowhere."""
    model = build()
    groups = by_name(get_optimizer_grouped_parameters(model, OptimizerConfig(1e-3)))
    spared = {id(p) for p in groups["no_decay"]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    norms = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    for name, _ in model.named_parameters():
        is_norm = name.endswith(norms) or "layernorm" in name
        assert (name in names) == (is_norm or name.endswith("bias")), name
    assert len(names) > 4


def test_norms_are_found_by_type():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.ones(1))

    model = nn.ModuleDict(
        {
            "a": nn.LayerNorm(2, bias=False),
            "b": nn.GroupNorm(1, 2, affine=True),
            "c": nn.RMSNorm(2),
            "d": nn.BatchNorm1d(2),
            "e": ScaleNorm(),
            "f": nn.Linear(2, 2, bias=False),
            "normal": nn.Linear(2, 2, bias=False),
        }
    )
    groups = by_name(get_optimizer_grouped_parameters(model, OptimizerConfig(1e-3)))
    assert {id(p) for p in groups["decay"]["params"]} == {
        id(model["f"].weight),
        id(model["normal"].weight),
    }


def test_rates_and_decays_of_each_group():
    """B learns at ratio * eta_A; embeddings of adapters, heads and the rest at their own."""
    config = OptimizerConfig(
        learning_rate=1e-4,
        weight_decay=0.1,
        lora_learning_rate=2e-4,
        loraplus_lr_ratio=8.0,
        head_learning_rate=3e-4,
    )
    names = ("all-linear", "embed_tokens")
    model = RewardModel(adapted_llama(use_dora=True, lora_module_name=names).model)
    model.requires_grad_(True)
    groups = by_name(get_optimizer_grouped_parameters(model, config))
    rates_and_decay = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates_and_decay == {
        "decay": (1e-4, 0.1),
        "no_decay": (1e-4, 0.0),
        "lora_A": (2e-4, 0.1),
        "lora_B": (pytest.approx(16e-4), 0.1),
        "lora_magnitude": (2e-4, 0.0),
        "lora_embedding": (1e-6, 0.1),
        "head": (3e-4, 0.1),
    }
    assert {p.ndim for p in groups["lora_magnitude"]["params"]} == {1}
    assert len(groups["lora_embedding"]["params"]) == 2
    assert groups["head"]["params"] == [model.v_head.weight]
    assert {p.shape[0] for p in groups["lora_A"]["params"]} == {4}
    assert {p.shape[1] for p in groups["lora_B"]["params"]} == {4}


def test_base_rate_reaches_adapters_and_head_unless_they_have_their_own():
    config = OptimizerConfig(learning_rate=5e-5)
    assert [config.rate(g) for g in ("lora_A", "head", "decay")] == [5e-5] * 3
    assert config.rate("lora_B") == pytest.approx(80e-5)
    config = OptimizerConfig(learning_rate=5e-5, lora_learning_rate=1e-4)
    assert config.rate("lora_B") == pytest.approx(16e-4) and config.rate("head") == 5e-5


def test_empty_groups_are_left_out_and_nothing_to_train_is_an_error():
    groups = get_optimizer_grouped_parameters(adapted_llama(), OptimizerConfig(1e-3))
    assert [g["name"] for g in groups] == ["lora_A", "lora_B"]
    assert [len(g["params"]) for g in groups] == [14, 14]
    with pytest.raises(UserError, match="no parameter is trainable"):
        get_optimizer_grouped_parameters(
            tiny.tiny_llama().requires_grad_(False), OptimizerConfig(1e-3)
        )


@pytest.mark.parametrize("name", ["learning_rate", "lora_learning_rate", "loraplus_lr_ratio"])
def test_rates_must_be_positive(name: str):
    with pytest.raises(UserError, match=f"{name} is 0"):
        OptimizerConfig(**{"learning_rate": 1e-3, name: 0})


@pytest.mark.parametrize("init", ["A", "B"])
def test_ratio_1_is_plain_lora_step_for_step(init: str):
    """Against one group of torch's AdamW over all adapters: equal to the last bit."""
    config = OptimizerConfig(1e-3, weight_decay=0.1, loraplus_lr_ratio=1.0, betas=(0.9, 0.99))
    ours = adapted_llama(lora_init=init)
    plain = copy.deepcopy(ours)
    optimizer = build_optimizer(get_optimizer_grouped_parameters(ours, config), config)
    one_group = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad],
        lr=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        fused=True,
    )
    for _ in range(4):
        for model, stepper in ((ours, optimizer), (plain, one_group)):
            stepper.zero_grad()
            loss_of(model).backward()
            stepper.step()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)


def test_first_effective_steps_are_as_large_as_the_rates():
    """Adam's first step is g / |g| times the rate; A has no gradient before B has moved."""
    config = OptimizerConfig(1e-4, loraplus_lr_ratio=16.0, eps=1e-12)
    model = adapted_llama()
    optimizer = build_optimizer(get_optimizer_grouped_parameters(model, config), config)
    for moving in ("lora_B", "lora_A"):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        change = {
            leaf: torch.cat(
                [(p - before[n]).abs().flatten() for n, p in model.named_parameters() if leaf in n]
            )
            for leaf in ("lora_A", "lora_B")
        }
        if moving == "lora_B":
            assert not change["lora_A"].any()
            assert change["lora_B"].median().item() == pytest.approx(16e-4, rel=NEAR_ONE)
    # The moments of A after a step without and one with a gradient g, each without its bias:
    # m = 0.1 g / (1 - 0.9^2), v = 0.05 g^2 / (1 - 0.95^2). A weight of A is below 1/sqrt(32) and
    # rounded when it is stored.
    share = 0.1 / (1 - 0.9**2) / math.sqrt(0.05 / (1 - 0.95**2))
    stored = ROUNDING / math.sqrt(32)
    assert change["lora_A"].max().item() <= share * 1e-4 + stored
    assert change["lora_A"].median().item() == pytest.approx(share * 1e-4, abs=stored)


def test_table_shows_each_group_and_the_share():
    """Each of two layers: A's (6 * 32 + 48) * 4 = 960, B's (3 * 32 + 2 * 16 + 2 * 48) * 4 = 896."""
    model = adapted_llama()
    total = sum(p.numel() for p in model.parameters())
    config = OptimizerConfig(1e-3, weight_decay=0.1)
    text = group_table(get_optimizer_grouped_parameters(model, config), model, "step 0")
    lines = text.splitlines()
    assert lines[0] == "step 0"
    heads = ["group", "learning rate", "weight decay", "tensors", "parameters"]
    assert [head.strip() for head in re.split("  +", lines[1])] == heads
    assert lines[2].split() == ["lora_A", "0.001", "0.1", "14", "1,920"]
    assert lines[3].split() == ["lora_B", "0.016", "0.1", "14", "1,792"]
    share = f"trainable 3,712 of {total:,} parameters ({100 * 3712 / total:.2f} %)"
    assert lines[4] == f"{share}; B learns at 16 times A's rate"
    assert len(lines) == 5


def levelled(config: OptimizerConfig, rate: float, **changes: float) -> torch.optim.Optimizer:
    optimizer = build_optimizer(get_optimizer_grouped_parameters(adapted_llama(), config), config)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group.update(changes)
    return optimizer


def test_levelled_rates_stop_the_run():
    config = OptimizerConfig(1e-3)
    check_rates(
        build_optimizer(get_optimizer_grouped_parameters(adapted_llama(), config), config), config
    )
    with pytest.raises(RuntimeError, match="are not the configured"):
        check_rates(levelled(config, 1e-3), config)
    with pytest.raises(RuntimeError, match="are not the configured"):  # hidden by a warm-up's 0
        check_rates(levelled(config, 0.0, initial_lr=1e-3), config)
    scheduled = levelled(config, 5e-4)
    for group in scheduled.param_groups:
        group["initial_lr"] = config.rate(group["name"])
    with pytest.raises(RuntimeError, match="lr_B / lr_A is 1, not the configured 16"):
        check_rates(scheduled, config)


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name: str, warm_up: int):
    from transformers import get_scheduler

    pair = []
    for build in (
        schedule_factory(name, warm_up, 10),
        lambda optimizer: get_scheduler(name, optimizer, warm_up, 10),
    ):
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1e-3, 16e-3)]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        scheduler = build(optimizer)
        rates = [scheduler.get_last_lr()]
        for _ in range(10):
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr())
        pair.append(rates)
    assert pair[0] == [pytest.approx(rates, rel=FIGURE, abs=FIGURE * 16e-3) for rates in pair[1]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_the_ratio(name: str):
    """Through warm-up and decay every group is its own rate times one common factor."""
    config = OptimizerConfig(1e-3, head_learning_rate=3e-3)
    model = RewardModel(adapted_llama().model)
    only_optimize_lora_parameters(model)
    optimizer = build_optimizer(get_optimizer_grouped_parameters(model, config), config)
    scheduler = schedule_factory(name, 3, 10)(optimizer)
    factors = []
    for _ in range(10):
        rates = group_rates(optimizer)
        factors.append(rates["lora_A"] / 1e-3)
        assert rates["lora_B"] == pytest.approx(16 * rates["lora_A"], rel=FIGURE)
        assert rates["head"] == pytest.approx(3 * rates["lora_A"], rel=FIGURE)
        check_rates(optimizer, config)
        optimizer.step()
        scheduler.step()
    warm_up = [1.0] * 3 if name == "constant" else [0.0, 1 / 3, 2 / 3]
    assert factors[:3] == pytest.approx(warm_up)
    assert factors[3] == pytest.approx(1.0)
    if name == "linear":
        assert factors[3:] == pytest.approx([(10 - t) / 7 for t in range(3, 10)])
    if name == "cosine":
        expected = [0.5 * (1 + math.cos(math.pi * (t - 3) / 7)) for t in range(3, 10)]
        assert factors[3:] == pytest.approx(expected)
