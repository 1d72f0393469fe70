"""Advantages of answers beside others to the same prompt: numbers worked by hand, no models."""

import dataclasses
import math

import pytest
import torch

from dschat.functional.returns import group_normalised, leave_one_out, shaped_rewards
from dschat.rlhf.advantages import whitened
from dschat.rlhf.experience import Experience
from tests.helpers.rounding import NEAR_ONE, ROUNDING
from tests.rlhf.test_ppo_numbers import learned, synthetic

GROUP = torch.tensor([4, 7, 4, 4, 7, 9])
REAL = torch.tensor([True, True, True, True, True, False])
SCORES = torch.tensor([1.0, 2.0, 4.0, -2.0, 5.0, 99.0])


def test_leave_one_out_by_hand():
    # group 4: 1, 4, -2      group 7: 2, 5      the row of group 9 only fills the batch
    expected = [1 - (4 - 2) / 2, 2 - 5, 4 - (1 - 2) / 2, -2 - (1 + 4) / 2, 5 - 2, 0]
    assert leave_one_out(SCORES, GROUP, REAL).tolist() == expected


def test_normalised_in_groups_by_hand():
    # group 4: mean 1, variance (0 + 9 + 9) / 3      group 7: mean 3.5, variance 1.5^2
    deviations = [6**0.5 + 1e-4, 1.5 + 1e-4]
    expected = [
        *(0.0, -1.5 / deviations[1], 3 / deviations[0]),
        *(-3 / deviations[0], 1.5 / deviations[1], 0.0),
    ]
    assert group_normalised(SCORES, GROUP, REAL).tolist() == pytest.approx(
        expected, abs=4 * ROUNDING
    )


@pytest.mark.parametrize("compare", [leave_one_out, group_normalised])
def test_fillers_count_in_no_group(compare):
    """Not even where one bears the number of a real group."""
    group, real = GROUP.clone(), REAL.clone()
    group[5] = 4
    assert torch.equal(compare(SCORES, group, real), compare(SCORES, GROUP, REAL))


@pytest.mark.parametrize("compare", [leave_one_out, group_normalised])
def test_equal_scores_say_nothing(compare):
    scores = torch.full((3,), 0.1) / 3  # a mean in fp32 would be another number
    assert compare(scores, torch.zeros(3), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_the_noise_of_equal_scores_is_no_signal():
    scores = torch.tensor([1.0, 1.0 + 1e-6])
    advantages = group_normalised(scores, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    # 1e-6 is 8 of fp32's 2^-23: a deviation of 4.8e-7 from the mean, over that and 1e-4, is 0.0048.
    deviation = 4 * 2.0**-23
    assert advantages.abs().max().item() == pytest.approx(deviation / (deviation + 1e-4))


@pytest.mark.parametrize("compare", [leave_one_out, group_normalised])
def test_a_lone_answer_cannot_be_compared(compare):
    with pytest.raises(ValueError, match="1 answers have no other"):
        compare(SCORES[:2], torch.tensor([0, 1]), torch.tensor([True, False]))


def test_a_k3_penalty_never_earns():
    # log(p/q) of 1/2 and -1/2; behind the answer q/p may be infinite
    logprobs, mask = torch.tensor([[0.5, -0.5, 0.0]]), torch.tensor([[True, True, False]])
    ref_logprobs = torch.tensor([[0.0, 0.0, 500.0]])
    rewards = shaped_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, mask, 0.2, "k3")
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5]
    expected = torch.tensor([[-0.2 * k3[0], 3.0 - 0.2 * k3[1], 0.0]])
    torch.testing.assert_close(rewards, expected, atol=NEAR_ONE, rtol=0)


def compared(
    estimator: str, ended: torch.Tensor | None = None, **changes: object
) -> list[Experience]:
    """Two answers to each of two prompts, a prompt's answers in different rollouts.

    `ended` replaces which answers of the first rollout ended.
    """
    rollouts = [
        synthetic(rewards=[2.0, 5.0], logprobs=[[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        synthetic(rewards=[1.0, -3.0], logprobs=[[0.0, -1.0, 0.0], [-2.0, 0.0, 0.0]]),
    ]
    if ended is not None:
        rollouts[0] = dataclasses.replace(rollouts[0], ended=ended)
    settings = {"advantage_estimator": estimator, "answers_per_prompt": 2, **changes}
    gae_only = {"gamma": 1.0, "lam": 0.95}
    return learned(rollouts, kl=0.5, **gae_only, **settings)


def test_rloo_by_hand():
    # Score less half the sum of log p - log q (q = 1 here): the first prompt's
    # answers come to 2 + 3 and 1 + 1/2, the second's to 5 + 2 and -3 + 1.
    rollouts = compared("rloo")
    assert rollouts[0].advantages.tolist() == [[3.5, 3.5, 3.5], [9.0, 0.0, 0.0]]
    assert rollouts[1].advantages.tolist() == [[-3.5, -3.5, -3.5], [-9.0, 0.0, 0.0]]
    assert rollouts[0].returns is None
    # Over all tokens: 3 x 3.5, 9, 3 x -3.5, -9.
    deviation = math.sqrt((6 * 3.5**2 + 2 * 81) / 8)
    assert whitened(rollouts)[1].advantages[1, 0].item() == pytest.approx(-9 / deviation)


def test_rloo_takes_the_missing_end_from_the_score():
    # Of the first prompt's answers, worth 2 + 3 and 1 + 1/2, none has its end; then one has.
    assert compared("rloo", missing_eos_penalty=4.0)[0].advantages[0].tolist() == [3.5] * 3
    ends = torch.tensor([True, True])
    assert compared("rloo", ends, missing_eos_penalty=4.0)[0].advantages[0].tolist() == [7.5] * 3


def test_grpo_by_hand():
    # Scores alone, 2 and 1, 5 and -3: no KL in them.
    rollouts = compared("grpo")
    first, second = 0.5 / (0.5 + 1e-4), 4 / (4 + 1e-4)
    expected = torch.tensor([[first] * 3, [second, 0.0, 0.0]])
    torch.testing.assert_close(rollouts[0].advantages, expected, atol=NEAR_ONE, rtol=0)
    torch.testing.assert_close(rollouts[1].advantages, -expected, atol=NEAR_ONE, rtol=0)
