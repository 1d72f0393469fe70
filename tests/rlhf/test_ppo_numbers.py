"""What PPO makes of a rollout before any update: numbers worked by hand, no models."""

import dataclasses
import math

import pytest
import torch

from dschat.models.logprobs import AnswerScores
from dschat.rlhf import ppo_updates
from dschat.rlhf.advantages import whitened, with_advantages
from dschat.rlhf.experience import Experience
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_statistics import (
    advantage_statistics,
    rollout_statistics,
    value_statistics,
    zero_spread,
)
from dschat.train.transfer import read_sums
from tests.helpers.recorder import Recorder
from tests.helpers.rounding import FIGURE, LOGITS, NEAR_ONE
from tests.helpers.tiny import PAD


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
        model_scores=None,
        group=torch.arange(2),
        rewards=torch.zeros(2),
    )
    return dataclasses.replace(e, **{n: torch.tensor(c) for n, c in columns.items()})


def learned(rollouts: list[Experience], kl: float = 0.0, **changes: object) -> list[Experience]:
    """With advantages by GAE where every return is the rewards to come, unless changed."""
    config = PPOConfig(**{"gamma": 1.0, "lam": 1.0, **changes})
    return with_advantages(rollouts, config, kl)


def test_a_missing_end_costs_its_penalty():
    # gamma = lambda = 1, values 0: every return of a row is its score.
    e = synthetic(rewards=[5.0, -5.0])
    raw = learned([e], missing_eos_penalty=2.0)
    assert raw[0].returns.tolist() == [[3.0, 3.0, 3.0], [-5.0, 0.0, 0.0]]
    assert torch.equal(raw[0].advantages, raw[0].returns)
    # Whitened over 3, 3, 3, -5: mean 1, variance (3 * 4 + 36) / 4 = 12.
    expected = torch.tensor([[2.0, 2.0, 2.0], [-6.0, 0.0, 0.0]]) / math.sqrt(12)
    torch.testing.assert_close(whitened(raw)[0].advantages, expected, atol=NEAR_ONE, rtol=0)
    statistics = advantage_statistics(raw)
    assert statistics == pytest.approx({"advantage_mean": 1.0, "advantage_std": math.sqrt(12)})


def test_whitening_runs_over_all_rollouts_together():
    rollouts = [synthetic(rewards=[1.0, 2.0]), synthetic(rewards=[4.0, -3.0])]
    inside = torch.cat([e.advantages[e.answer_mask] for e in whitened(learned(rollouts))])
    raw = torch.tensor([1.0, 1, 1, 2, 4, 4, 4, -3])
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(inside, expected, atol=NEAR_ONE, rtol=0)


def test_rollout_statistics_by_hand():
    # What lies behind the second answer must not show, infinite or not.
    e = synthetic(
        rewards=[2.0, 5.0],
        logprobs=[[-1.0, -2.0, -3.0], [-4.0, -1.0, -200.0]],
        ref_logprobs=[[-1.5, -2.0, -4.0], [-3.0, -500.0, 0.0]],
    )
    statistics = rollout_statistics([e])
    k1 = [0.5, 0.0, 1.0, -1.0]  # log p - log q
    k3 = [math.exp(-x) - 1 + x for x in k1]
    expected = {
        "reward": 3.5,
        "reward_error": 1.5,  # of two prompts that are 1.5 off the mean: 1.5 * sqrt(2) / sqrt(2)
        "kl": (0.5 + 0.0 + 1.0 - 1.0) / 2,  # a sum over each answer, then the mean of answers
        "kl_per_token": sum(k1) / 4,
        "kl_k3": sum(k3) / 4,
        "answers": 2.0,
        "answer_length": 2.0,
        "answer_length_error": 1.0,
        "ended": 0.5,
        "ref_nats_per_token": (1.5 + 2.0 + 4.0 + 3.0) / 4,
    }
    assert statistics == pytest.approx(expected, abs=NEAR_ONE)
    # Two answers to each of two prompts, 1 and 5 in the mean: nothing but these differ.
    pairs = [
        synthetic(rewards=[0.0, 2.0], group=[0, 0]),
        synthetic(rewards=[4.0, 6.0], group=[1, 1]),
    ]
    assert rollout_statistics(pairs)["reward_error"] == pytest.approx(2.0)
    alone = synthetic(rewards=[0.0, 2.0], group=[0, 0])
    assert "reward_error" not in rollout_statistics([alone])
    # By the sampler the three tokens of the first answer were 0, 0.2 and 0.4 likelier.
    told = e.logprobs + torch.tensor([[0.0, 0.2, -0.4], [0.0, 9.0, 9.0]])
    statistics = rollout_statistics([dataclasses.replace(e, sampler_logprobs=told)])
    gaps = {"decode_gap": 0.6 / 4, "decode_gap_max": 0.4}
    assert statistics == pytest.approx(expected | gaps, abs=NEAR_ONE)


@pytest.mark.parametrize(("penalty", "share"), [(0.0, 2 / 3), (2.0, 1 / 3)])
def test_the_share_of_prompts_whose_answers_are_worth_the_same(penalty, share):
    """Prompt 0: 2 and 2; prompt 1: 1 and -3; prompt 2: 5 alone, which its filler twin is not."""
    rollouts = [synthetic(rewards=[2.0, 1.0]), synthetic(rewards=[-3.0, 2.0])]
    rollouts[1] = dataclasses.replace(rollouts[1], group=torch.tensor([1, 0]))
    third = synthetic(rewards=[5.0, 6.0])
    third = dataclasses.replace(third, group=torch.tensor([2, 2]), real=torch.tensor([True, False]))
    # Of the first prompt's answers the second alone has its end.
    assert zero_spread([*rollouts, third], penalty) == pytest.approx(share)


def test_explained_variance_by_hand():
    # returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    # errors 1, 0, -1, 0: variance 1/2; 1 - 0.5 / 3.5
    e = synthetic(values=[[0.0, 2.0, 4.0], [6.0, 0.0, 0.0]])
    e = e.with_returns(torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]))
    statistics = value_statistics([e])
    expected = {"returns": 3.0, "explained_variance": 1 - 0.5 / 3.5}
    assert statistics == pytest.approx(expected, abs=FIGURE)


def test_what_the_critics_steps_report(monkeypatch):
    e = synthetic(values=[[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    e = e.with_returns(torch.zeros(2, 3), e.values)
    moved = e.values + torch.tensor([[0.1, -0.3, 0.3], [0.0, 9.0, 9.0]])
    monkeypatch.setattr(ppo_updates, "answer_values", lambda *_: moved)
    config = PPOConfig(cliprange_value=0.2)
    updates = ppo_updates.Updates(None, config, 1, torch.Generator())
    with Recorder() as recorder:
        loss, sums = updates.critic_loss(None, e)
    assert recorder.reads == 0  # the numbers of a step leave together
    (sums,) = read_sums([sums])
    expected = {"tokens": 4, "value_clip_fraction": 2, "critic_loss": (0.01 + 0.09 + 0.09) / 2}
    assert sums == pytest.approx(expected, abs=NEAR_ONE)
    assert loss.item() == sums["critic_loss"]


def test_what_the_actors_steps_report(monkeypatch):
    e = synthetic(logprobs=[[-1.0, -1.0, -1.0], [-1.0, -1000.0, 0.0]])
    e = e.with_returns(torch.ones(2, 3) * e.answer_mask)
    ratios = [1.0, 1.5, 0.5, 1.1]
    now = e.logprobs + torch.tensor([ratios[:3], [ratios[3], math.inf, 7.0]]).log()
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 50.0]])
    scored = AnswerScores(now, entropy)
    monkeypatch.setattr(ppo_updates.Updates, "policy_scores", lambda *_, **__: scored)
    config = PPOConfig(cliprange=0.2)
    updates = ppo_updates.Updates(None, config, 1, torch.Generator())
    with Recorder() as recorder:
        _, sums = updates.actor_loss(e)
    assert recorder.reads == 0
    (sums,) = read_sums([sums])
    expected = {
        "tokens": 4,
        "actor_loss": -(1.0 + 1.2 + 0.5 + 1.1),
        "ratio": sum(ratios),
        "clip_fraction": 2,
        "approx_kl": sum(r - 1 - math.log(r) for r in ratios),
        "entropy": 10.0,
    }
    assert sums == pytest.approx(expected, abs=LOGITS)
