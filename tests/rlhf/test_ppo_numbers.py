"""What PPO makes of a rollout before any update: numbers worked by hand, no models."""

import dataclasses
import math

import pytest
import torch
from tiny import PAD

from dschat.errors import UserError
from dschat.rlhf.experience import Experience
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer, PPOConfig


def synthetic(**columns: list) -> Experience:
    """Two answers of 3 and 1 tokens behind prompts of 2, with numbers to calculate by hand."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros = torch.zeros(2, 3)
    e = Experience(
        sequences=torch.full((2, 5), PAD),
        attention_mask=torch.cat([torch.ones(2, 2, dtype=torch.bool), mask], dim=1),
        answer_mask=mask,
        ended=torch.tensor([False, True]),
        real=torch.tensor([True, True]),
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=torch.zeros(2),
        group=torch.arange(2),
    )
    return dataclasses.replace(e, **{n: torch.tensor(c) for n, c in columns.items()})


def bare_trainer(**changes: object) -> DeepSpeedPPOTrainer:
    """A trainer for what needs no models."""
    return DeepSpeedPPOTrainer(None, PPOConfig(SamplingConfig(), **changes), world_size=1)


def test_scores_are_clipped_before_the_penalty():
    # gamma = lambda = 1, values 0: every return of a row is its score.
    e = synthetic(scores=[9.0, -9.0])
    trainer = bare_trainer(reward_clip=5.0, missing_eos_penalty=2.0, gamma=1.0, lam=1.0)
    learned = trainer.with_advantages([e])[0]
    assert learned.returns.tolist() == [[3.0, 3.0, 3.0], [-5.0, 0.0, 0.0]]
    # Whitened over 3, 3, 3, -5: mean 1, variance (3 * 4 + 36) / 4 = 12.
    expected = torch.tensor([[2.0, 2.0, 2.0], [-6.0, 0.0, 0.0]]) / math.sqrt(12)
    torch.testing.assert_close(learned.advantages, expected, atol=1e-6, rtol=0)


def test_whitening_runs_over_all_rollouts_together():
    rollouts = [synthetic(scores=[1.0, 2.0]), synthetic(scores=[4.0, -3.0])]
    learned = bare_trainer(gamma=1.0, lam=1.0).with_advantages(rollouts)
    inside = torch.cat([e.advantages[e.answer_mask] for e in learned])
    raw = torch.tensor([1.0, 1, 1, 2, 4, 4, 4, -3])
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(inside, expected, atol=1e-6, rtol=0)


def test_rollout_statistics_by_hand():
    # What lies behind the second answer must not show, infinite or not.
    e = synthetic(
        scores=[2.0, 5.0],
        logprobs=[[-1.0, -2.0, -3.0], [-4.0, -1.0, -200.0]],
        ref_logprobs=[[-1.5, -2.0, -4.0], [-3.0, -500.0, 0.0]],
    )
    statistics = bare_trainer().rollout_statistics([e])
    k1 = [0.5, 0.0, 1.0, -1.0]  # log p - log q
    k3 = [math.exp(-x) - 1 + x for x in k1]
    expected = {
        "reward": 3.5,
        "kl": (0.5 + 0.0 + 1.0 - 1.0) / 2,  # a sum over each answer, then the mean of answers
        "kl_per_token": sum(k1) / 4,
        "kl_k3": sum(k3) / 4,
        "answer_length": 2.0,
        "ended": 0.5,
        "ref_nats_per_token": (1.5 + 2.0 + 4.0 + 3.0) / 4,
    }
    assert statistics == pytest.approx(expected, abs=1e-6)


def test_explained_variance_by_hand():
    # returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    # errors 1, 0, -1, 0: variance 1/2; 1 - 0.5 / 3.5
    e = synthetic(values=[[0.0, 2.0, 4.0], [6.0, 0.0, 0.0]])
    e = e.with_returns(torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]))
    statistics = bare_trainer().value_statistics([e])
    expected = {"returns": 3.0, "explained_variance": 1 - 0.5 / 3.5}
    assert statistics == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip_range": 0.0}, "cliprange is 0.0"),
        ({"value_clip_range": -1.0}, "cliprange_value is -1.0"),
        ({"reward_clip": 0.0}, "reward_clip is 0.0"),
        ({"kl_coefficient": -0.1}, "kl_coef is -0.1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"ppo_epochs": 0}, "ppo_epochs is 0"),
        ({"rollout_batch_size": 0}, "per_device_generation_batch_size is 0"),
        ({"micro_batch_size": 0}, "per_device_training_batch_size is 0"),
    ],
)
def test_coefficients_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(SamplingConfig(), **settings)
