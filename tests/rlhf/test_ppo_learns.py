"""Four epochs on each set of rollouts move the policy towards a reward, and not out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.module.lora_config import LoraConfig
from tests.rlhf.tiny_roles import Setting, ppo_trainer, prompts

FULL = Setting(learning_rate=2e-2, eps=1e-8, micro_batch=64)
LORA = LoraConfig(8, lora_module_name=("lm_head", "q_proj"))
ADAPTERS = Setting(lora=LORA, learning_rate=1e-2, eps=1e-8, micro_batch=64)


def low_bytes(roles: DeepSpeedRLHFEngine, sequences: torch.Tensor, mask: torch.Tensor, _: int):
    """A reward that can be read off the text: the share of low token ids in the last 2 places."""
    return (sequences[:, -2:] < 132).float().mean(-1)


@pytest.fixture
def learn(load_roles, monkeypatch) -> Callable[..., list[dict[str, float]]]:
    """The statistics of each iteration."""

    def run(setting: Setting, estimator: str, iterations: int, **changes: object):
        monkeypatch.setattr(DeepSpeedRLHFEngine, "reward_scores", low_bytes)
        roles = load_roles(setting, **({} if estimator == "gae" else {"critic": None}))
        if estimator == "gae":
            changes["cliprange_value"] = 10.0
        else:
            changes["advantage_estimator"] = estimator
        common = {"answer": 2, "per_device_generation_batch_size": 16, "answers_per_prompt": 4}
        common |= {"ppo_epochs": 4, "kl_coef": 0.0}
        trainer = ppo_trainer(roles, setting, **common, **changes)
        torch.manual_seed(3)
        steps = []
        for _ in range(iterations):
            steps.append(trainer.train_rlhf(trainer.rollout([prompts(16)])))
        return steps

    return run


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("setting, iterations", [(FULL, 6), (ADAPTERS, 10)], ids=["full", "lora"])
def test_a_reward_rises(learn, setting, iterations, estimator):
    steps = learn(setting, estimator, iterations)
    rewards = [step["reward"] for step in steps]
    assert rewards[0] < 0.6  # about half of all tokens
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.15, rewards
    assert all(step["approx_kl"] < 2.0 and step["actor_updates"] == 1.0 for step in steps)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_a_reward_rises_within_a_limit(learn, estimator):
    """Steps that are far too large: what the limit leaves of them still gets there."""
    steps = learn(FULL, estimator, 10, update_kl_limit=0.1)
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.15, rewards
    assert any(step["actor_updates"] < 1.0 for step in steps)
    for step in steps:
        assert step["approx_kl"] < 0.1
        assert (step["update_kl"] > 0.1) == (step["actor_updates"] < 1.0)
