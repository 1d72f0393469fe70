"""Returns against a slow float64 reference that knows rows and tokens, not masks and columns."""

import math

import pytest
import torch

from dschat.functional.returns import (
    answer_mask_from,
    generalized_advantages,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_moments,
    shaped_rewards,
    whiten,
)
from tests.helpers.rounding import FIGURE, NEAR_ONE, ROUNDING

EOS, PAD = 2, 0
LENGTHS = [4, 1, 0, 6, 3]  # one answer that is a lone end token, one filler row, one full
WIDTH = 6


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(actual: torch.Tensor, expected: list | torch.Tensor, tolerance: float = NEAR_ONE) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_answer_mask_ends_with_the_first_end_token(pad):
    answers = torch.tensor(
        [
            [5, 6, EOS, pad, pad],
            [EOS, pad, pad, pad, pad],
            [5, 6, 7, 8, EOS],
            [5, 6, 7, 8, 9],  # ran out of room: no end token at all
            [5, EOS, 7, EOS, pad],  # nothing behind the first end token belongs to the answer
        ]
    )
    lengths = answer_mask_from(answers, EOS).sum(-1)
    assert lengths.tolist() == [3, 1, 5, 5, 2]
    assert answer_mask_from(answers, EOS).dtype == torch.bool
    assert torch.equal(answer_mask_from(answers, EOS), torch.arange(5) < lengths[:, None])


def test_a_pad_token_inside_an_answer_is_an_answer_token():
    assert answer_mask_from(torch.tensor([[5, PAD, 6, EOS, PAD]]), EOS).tolist() == [
        [True, True, True, True, False]
    ]


def slow_rewards(scores, logprobs, ref_logprobs, coefficient) -> list[list[float]]:
    rewards = [[0.0] * WIDTH for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            gap = logprobs[row, t].item() - ref_logprobs[row, t].item()
            rewards[row][t] = -coefficient * gap
        if length:
            rewards[row][length - 1] += scores[row].item()
    return rewards


def slow_gae(rewards, values, gamma: float, lam: float) -> list[list[float]]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, with V = 0 at the end of the answer."""
    advantages = [[0.0] * WIDTH for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        state = [values[row, t].item() for t in range(length)] + [0.0]
        deltas = [float(rewards[row][t]) + gamma * state[t + 1] - state[t] for t in range(length)]
        for t in range(length):
            advantages[row][t] = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
    return advantages


def test_shaped_rewards():
    logprobs, ref_logprobs = random(0, 5, WIDTH), random(1, 5, WIDTH)
    scores = torch.tensor([1.5, -2.0, 33.0, 0.25, 4.0])
    rewards = shaped_rewards(scores, logprobs, ref_logprobs, mask_of(LENGTHS), 0.3)
    equal(rewards, slow_rewards(scores, logprobs, ref_logprobs, 0.3))


def test_the_score_lands_on_the_last_answer_token():
    zeros = torch.zeros(5, WIDTH)
    rewards = shaped_rewards(torch.full((5,), 7.0), zeros, zeros, mask_of(LENGTHS), 0.1)
    assert rewards.nonzero().tolist() == [[0, 3], [1, 0], [3, 5], [4, 2]]
    assert rewards.sum() == 28.0


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae(gamma, lam):
    mask = mask_of(LENGTHS)
    rewards, values = random(2, 5, WIDTH), random(3, 5, WIDTH)  # both go on behind the end
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    expected = torch.tensor(slow_gae(rewards, values, gamma, lam), dtype=torch.float64)
    equal(advantages, expected, 2e-6)
    equal(returns, (expected + values.double()) * mask, 2e-6)


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2, rewards (1, 2), values (3, 5):
    #   delta_1 = 2 - 5 = -3            A_1 = -3
    #   delta_0 = 1 + 5/2 - 3 = 1/2     A_0 = 1/2 + 1/4 * -3 = -1/4
    mask = torch.tensor([[True, True, False]])
    rewards, values = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 5.0, 99.0]])
    advantages, returns = generalized_advantages(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[-0.25, -3.0, 0.0]]
    assert returns.tolist() == [[2.75, 2.0, 0.0]]


def test_values_behind_the_end_do_not_matter():
    mask = mask_of(LENGTHS)
    rewards, values = random(2, 5, WIDTH) * mask, random(3, 5, WIDTH)
    spoilt = values.where(mask, 1e6)
    for one, other in zip(
        generalized_advantages(rewards, values, mask, 1.0, 0.9),
        generalized_advantages(rewards, spoilt, mask, 1.0, 0.9),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert not one[~mask].any()


def test_with_lambda_one_returns_are_the_rewards_to_come():
    mask = mask_of(LENGTHS)
    rewards = random(4, 5, WIDTH) * mask
    _, returns = generalized_advantages(rewards, random(5, 5, WIDTH), mask, 1.0, 1.0)
    to_come = rewards.double().flip(-1).cumsum(-1).flip(-1)
    equal(returns, to_come * mask, 2e-6)


def test_masked_mean_and_moments():
    mask, x = mask_of(LENGTHS), random(6, 5, WIDTH)
    inside = [x[row, t].item() for row, length in enumerate(LENGTHS) for t in range(length)]
    mean = sum(inside) / 14
    variance = sum((value - mean) ** 2 for value in inside) / 14
    assert masked_mean(x, mask) == pytest.approx(mean, abs=FIGURE)
    assert masked_moments(x, mask) == pytest.approx((mean, variance), abs=FIGURE)
    assert masked_mean(x, torch.zeros_like(mask)) == 0.0


@pytest.mark.parametrize("outside", [math.inf, -math.inf, math.nan])
def test_masked_mean_ignores_what_is_not_a_number_outside(outside):
    x = torch.tensor([1.0, 2.0, outside])
    assert masked_mean(x, torch.tensor([True, True, False])) == 1.5


def test_whitening():
    mask, x = mask_of(LENGTHS), random(7, 5, WIDTH) * 3 + 11
    white = whiten(x, mask)
    inside = x[mask].double()
    # Population variance; the sign of the deviation is kept.
    equal(white[mask], (inside - inside.mean()) / inside.std(correction=0), 4 * NEAR_ONE)
    assert not white[~mask].any()
    assert torch.equal(white[mask].argsort(), x[mask].argsort())
    assert white[mask].double().mean().abs() < NEAR_ONE
    # A single value, or several equal ones, become zeros and not infinities.
    assert not whiten(torch.full((5, WIDTH), 3.0), mask).any()
    assert not whiten(x, torch.zeros_like(mask)).any()


def test_whitening_over_two_ranks_is_whitening_of_both():
    mask, x = mask_of(LENGTHS), random(8, 5, WIDTH)
    halves = [slice(0, 1), slice(1, 5)]  # 4 and 10 tokens
    # Each call of whiten reduces twice: for the mean, then for the variance around it.
    parts = [x[half][mask[half]].double() for half in halves]
    mean = torch.cat(parts).mean()
    sums = [
        [sum(p.sum().item() for p in parts), 14.0],
        [sum((p - mean).square().sum().item() for p in parts), 14.0],
    ]
    for half in halves:
        answers = iter(sums)
        white = whiten(x[half], mask[half], lambda _, answers=answers: next(answers))
        equal(white, whiten(x, mask)[half])


def test_kl_estimators_by_hand():
    # p = 1/2, q = 1/8: k1 = log 4, k3 = 1/4 - 1 + log 4
    logprobs, ref_logprobs = torch.tensor([math.log(1 / 2)]), torch.tensor([math.log(1 / 8)])
    equal(kl_k1(logprobs, ref_logprobs), [math.log(4)])
    equal(kl_k3(logprobs, ref_logprobs), [1 / 4 - 1 + math.log(4)])


def test_both_estimators_average_to_the_kl_divergence():
    p, q = random(9, 12).double().softmax(-1), random(10, 12).double().softmax(-1)
    kl = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):
        equal((p * estimator(p.log(), q.log())).sum(), kl, FIGURE)
    assert (kl_k3(p.log(), q.log()) >= 0).all() and (kl_k1(p.log(), q.log()) < 0).any()


def test_k3_keeps_its_digits_near_zero():
    # x = 1e-4: e^x - 1 - x = x^2 / 2 + x^3 / 6 + ..., which fp32 would lose in e^x - 1. Of expm1 it
    # loses only x's own rounding, relative to x^2 / 2: 2^-24 x / (x^2 / 2) = 2^-23 / x = 0.0012
    found = kl_k3(torch.zeros(1), torch.tensor([1e-4])).item()
    assert found == pytest.approx(5.00016667e-9, rel=2 * ROUNDING / 1e-4)
