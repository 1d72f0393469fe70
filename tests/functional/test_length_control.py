"""Win rate at equal lengths: by hand without lengths, by an independent optimum with them."""

import math

import pytest
import torch

from dschat.functional.length_control import length_controlled


def test_without_a_difference_of_length_it_is_the_win_rate_with_half_a_win_to_each_side():
    # Firth on an intercept alone: (7.5 + 0.5) / (10 + 1); its interval by the logit
    wins = torch.tensor([1.0] * 7 + [0.5] + [0.0] * 2)
    for difference in (torch.zeros(10), torch.full((10,), 3.0)):
        found = length_controlled(wins, difference)
        assert found.win_rate == pytest.approx(8 / 11, abs=1e-9) and found.slope == 0.0
        half = 1.959964 / math.sqrt(10 * 8 / 11 * 3 / 11)
        logit = math.log(8 / 3)
        expected = [1 / (1 + math.exp(-x)) for x in (logit - half, logit + half)]
        assert [found.low, found.high] == pytest.approx(expected, abs=1e-6)


def penalised(weights: torch.Tensor, design: torch.Tensor, wins: torch.Tensor) -> torch.Tensor:
    """Log likelihood with Firth's penalty, half the log determinant of the information."""
    chance = torch.sigmoid(design @ weights)
    likelihood = (wins * chance.log() + (1 - wins) * (1 - chance).log()).sum()
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    return likelihood + 0.5 * torch.logdet(information)


def test_it_is_the_optimum_of_the_penalised_likelihood():
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(60, generator=draw).double() * 30 + 10
    chance = torch.sigmoid(0.3 + 1.5 * torch.tanh(difference / 30))
    wins = (torch.rand(60, generator=draw) < chance).double()
    found = length_controlled(wins, difference)
    design = torch.stack([torch.ones(60), torch.tanh(difference / difference.std(correction=0))], 1)
    logit = math.log(found.win_rate / (1 - found.win_rate))
    weights = torch.tensor([logit, found.slope], dtype=torch.float64, requires_grad=True)
    penalised(weights, design.double(), wins).backward()
    assert weights.grad.abs().max() < 1e-7


def test_a_judge_of_length_alone_finds_no_difference_at_equal_lengths():
    """The first is longer in 80 of 100 and wins these: at equal lengths one half is inside."""
    size = torch.arange(1, 101).double()
    difference = torch.where(torch.arange(100) % 5 == 0, -size, size)
    found = length_controlled((difference > 0).double(), difference)
    assert found.low < 0.5 < found.high and found.slope > 3
    assert found.win_rate < 0.7 < 0.8


def test_all_wins_stay_finite():
    found = length_controlled(torch.ones(20), torch.arange(20).double() - 9.5)
    assert 0.5 < found.low < found.win_rate < 1 and math.isfinite(found.slope)
