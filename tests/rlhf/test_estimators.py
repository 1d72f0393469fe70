"""The registry of estimators, and that PPO reads all it knows of one from its record."""

from dataclasses import replace

import pytest
import torch

from dschat.errors import UserError
from dschat.rlhf import estimators
from dschat.rlhf.advantages import with_advantages
from dschat.rlhf.estimators import ESTIMATORS, Estimator
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.ppo_config import PPOConfig
from dschat.settings import flags_of
from tests.rlhf.hand_made import sampled


def test_names_are_the_choices_of_the_flag():
    assert list(ESTIMATORS) == ["gae", "rloo", "grpo"]
    assert all(estimator.name == name for name, estimator in ESTIMATORS.items())
    flag = next(f for f in flags_of(PPOConfig) if f.name == "advantage_estimator")
    assert flag.rule.choices == tuple(ESTIMATORS)


def test_settings_construct_from_python():
    assert PPOConfig().estimator is ESTIMATORS["gae"]
    config = PPOConfig.of(advantage_estimator="rloo", answers_per_prompt=4, temperature=0.5)
    assert (config.answers_per_prompt, config.sampling.temperature) == (4, 0.5)


def reward_alone(
    experiences: list[Experience], rewards: list[torch.Tensor], gamma: float, lam: float
) -> list[Experience]:
    """REINFORCE without a baseline."""
    pairs = zip(experiences, rewards, strict=True)
    return [e.with_returns(r.sum(-1, keepdim=True) * e.answer_mask) for e, r in pairs]


def test_a_record_is_all_that_a_new_estimator_needs(monkeypatch):
    record = Estimator("reinforce", reward_alone, kl_in_loss=True, min_answers=1)
    monkeypatch.setitem(estimators.ESTIMATORS, "gae", record)
    config = PPOConfig()
    assert not config.whitens
    e = replace(sampled(), rewards=torch.tensor([3.0, -1.0, 50.0]))
    e = replace(e, logprobs=e.logprobs + 1.0)  # the KL is in the loss: no part of the reward
    (learned,) = with_advantages([e], config, kl_coef=0.5)
    assert filled(learned.advantages).tolist() == [[3.0] * 4, [-1.0] * 4, [0.0] * 4]
    with pytest.raises(UserError, match=r"lam is 0\.9, but advantage_estimator gae has no critic"):
        PPOConfig(lam=0.9)


def test_an_empty_column_is_an_error():
    with pytest.raises(ValueError, match="an earlier stage fills it"):
        filled(sampled().advantages)
