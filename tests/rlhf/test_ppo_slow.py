"""Whole updates against plain PyTorch in float64: every estimator, every way to hold an update."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dschat.rlhf.experience import Experience
from tests.helpers.rounding import MOVED, NEAR_ONE
from tests.rlhf.slow_ppo import Numbers, SlowPPO, Text
from tests.rlhf.tiny_roles import (
    EPS,
    Setting,
    assert_trained_alike,
    largest_change,
    ppo_trainer,
    rollout,
    weights,
    without_critic,
)

# All coefficients away from their defaults; the same by the names of either side.
COMMON = {"gamma": 0.97, "lam": 0.9, "reward_clip": 0.4, "missing_eos_penalty": 0.6}
FAST = {**COMMON, "kl_coef": 0.7, "cliprange": 0.02, "cliprange_value": 0.05}
SLOW = {**COMMON, "kl": 0.7, "clip": 0.02, "value_clip": 0.05}
CRITIC_FREE = {"gamma": 1.0, "lam": 0.95, "cliprange_value": 0.2, "answers_per_prompt": 2}
GROUPS = [5, 9, 5, 9]  # of the four rows

CASES = {
    "k1": ({}, {}),
    "k3": ({"kl_estimator": "k3"}, {"kl_estimator": "k3"}),
    "not whitened": ({"whiten_advantages": "never"}, {"whitens": False}),
    "rloo": (
        {**CRITIC_FREE, "advantage_estimator": "rloo"},
        {"estimator": "rloo", "whitens": False},
    ),
    "rloo, k3, whitened": (
        {
            **CRITIC_FREE,
            "advantage_estimator": "rloo",
            "kl_estimator": "k3",
            "whiten_advantages": "always",
        },
        {"estimator": "rloo", "kl_estimator": "k3"},
    ),
    "grpo": (
        {**CRITIC_FREE, "advantage_estimator": "grpo"},
        {"estimator": "grpo", "whitens": False},
    ),
    "grpo, adaptive KL": (
        {**CRITIC_FREE, "advantage_estimator": "grpo", "kl_target": 0.5, "kl_horizon": 5},
        {"estimator": "grpo", "whitens": False, "kl_target": 0.5, "kl_horizon": 5},
    ),
    "adaptive KL": (
        {"kl_target": 0.5, "kl_horizon": 5},
        {"kl_target": 0.5, "kl_horizon": 5},
    ),
    "warm-up": ({"critic_warmup_iterations": 1}, {"warmup": 1}),
    "early end": ({"update_kl_limit": 0.7}, {"kl_limit": 0.7}),
    "value clipping off": ({"cliprange_value": 0.0}, {"value_clip": 1e9}),
}
# Of three steps in each of two rounds.
ACTOR_STEPS = {"warm-up": [0, 3], "early end": [1, 2]}


def text_of(e: Experience, row: int) -> Text:
    """The ids alone of one row, as the slow reference takes them."""
    prompt = int(e.attention_mask[row, : e.prompt_length].sum())
    return Text(e.sequences[row][e.attention_mask[row]], prompt, bool(e.ended[row]))


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_those_of_plain_pytorch(load_roles, folders, case):
    """Two rounds of rollout and three epochs."""
    fast, slow = CASES[case]
    setting = Setting()
    numbers = Numbers(
        **{**SLOW, **slow},
        epochs=3,
        learning_rate=setting.learning_rate,
        eps=EPS,
        max_norm=setting.clipping,
    )
    roles = load_roles(setting)
    if numbers.estimator != "gae":
        roles = without_critic(roles)
    trainer = ppo_trainer(roles, setting, **{**FAST, **fast, "ppo_epochs": 3})
    reference = SlowPPO(folders["llama"], numbers)
    before = weights(roles.actor.module)
    for seed in range(2):
        e = dataclasses.replace(rollout(trainer, seed), group=torch.tensor(GROUPS))
        assert (e.model_scores.abs() > 0.4).any() and not e.ended.all()
        assert trainer.kl.coefficient == pytest.approx(reference.beta, abs=NEAR_ONE)
        statistics = trainer.train_rlhf([e])
        assert statistics["kl_coefficient"] == pytest.approx(reference.beta, abs=NEAR_ONE)
        made = reference.update([text_of(e, row) for row in range(4)], GROUPS)
        assert made == ACTOR_STEPS.get(case, [3, 3])[seed]
        assert statistics["actor_updates"] == pytest.approx(made / 3)
        if made == 3:
            assert 0 < statistics["clip_fraction"] < 1
    assert largest_change(before, weights(roles.actor.module)) > MOVED
    assert (reference.beta != numbers.kl) == (case.endswith("adaptive KL"))

    expected = {name: p.detach().float() for name, p in reference.actor.named_parameters()}
    assert_trained_alike(weights(roles.actor.module), expected, setting, steps=6)
    if roles.critic is None:
        return
    critic = {
        name.replace("rwtransformer.", "model.").replace("v_head", "score"): p
        for name, p in weights(roles.critic.module).items()
    }
    expected = {name: p.detach().float() for name, p in reference.critic.named_parameters()}
    assert_trained_alike(critic, expected, setting, steps=6)
