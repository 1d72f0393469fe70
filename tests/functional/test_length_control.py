"""Win rate at equal lengths: by hand without lengths, by an independent optimum with them."""

import math

import pytest
import torch

from dschat.functional.length_control import ROUNDING, SMALLEST_STEP, length_controlled


# A sigmoid's slope is at most 1/4, and a step is half of what is left: the last is SMALLEST_STEP.
def test_without_a_difference_of_length_it_is_the_win_rate_with_half_a_win_to_each_side():
    # Firth on an intercept alone: (7.5 + 0.5) / (10 + 1); its interval by the logit
    wins = torch.tensor([1.0] * 7 + [0.5] + [0.0] * 2)
    found = length_controlled(wins, torch.zeros(10))
    assert found.win_rate == pytest.approx(8 / 11, abs=SMALLEST_STEP / 4)
    assert found.slope == 0.0
    deviation = math.sqrt(10 * 8 / 11 * 3 / 11)
    half = 1.959964 / deviation  # as printed, off by up to 5e-7
    logit = math.log(8 / 3)
    expected = [1 / (1 + math.exp(-x)) for x in (logit - half, logit + half)]
    assert [found.low, found.high] == pytest.approx(expected, abs=5e-7 / deviation / 4)


def test_where_all_differ_alike_nothing_is_known_of_equal_lengths():
    assert length_controlled(torch.ones(10), torch.full((10,), 3.0)) is None
    nearly = length_controlled(torch.ones(10), torch.tensor([1000.0] * 9 + [1001.0]))
    assert nearly.low < 1 / 1000 and nearly.high > 0.999  # far from 0, and finite


def penalised(weights: torch.Tensor, design: torch.Tensor, wins: torch.Tensor) -> torch.Tensor:
    """Log likelihood with Firth's penalty, half the log determinant of the information."""
    chance = torch.sigmoid(design @ weights)
    likelihood = (wins * chance.log() + (1 - wins) * (1 - chance).log()).sum()
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    return likelihood + 0.5 * torch.logdet(information)


def assert_optimal(value: torch.Tensor, weights: torch.Tensor, count: int) -> None:
    """The gradient g is what a search that sees ROUNDING of the likelihood cannot tell from 0.

    A step gains g^2 / 2 over the curvature, a quarter or less of each verdict.
    """
    value.backward()
    assert weights.grad.abs().max() < math.sqrt(2 * count / 4 * ROUNDING * abs(value.item()))


def test_it_is_the_optimum_of_the_penalised_likelihood():
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(60, generator=draw).double() * 30 + 10
    chance = torch.sigmoid(0.3 + 1.5 * torch.tanh(difference / 30))
    wins = (torch.rand(60, generator=draw) < chance).double()
    found = length_controlled(wins, difference)
    size = difference.square().mean().sqrt()
    design = torch.stack([torch.ones(60), torch.tanh(difference / size)], 1)
    logit = math.log(found.win_rate / (1 - found.win_rate))
    weights = torch.tensor([logit, found.slope], dtype=torch.float64, requires_grad=True)
    assert_optimal(penalised(weights, design.double(), wins), weights, len(wins))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_it_is_the_optimum_of_few_and_of_one_sided_verdicts(count: int, seed: int):
    """Whole scoring steps never ended there: of one prompt they swung to and fro."""
    draw = torch.Generator().manual_seed(seed)
    difference = (torch.randn(count, generator=draw).exp() * 20 - 15).round().double()
    wins = (difference > 0).double() if seed % 2 else torch.ones(count).double()
    wins[torch.rand(count, generator=draw) < 0.3] = 0.5
    if count == 1:
        difference = torch.zeros(1).double()
    elif seed > 3:
        difference = torch.where(torch.arange(count) < count - 1, 0.0, 200.0).double()
    found = length_controlled(wins, difference)
    columns = [torch.ones(count).double()]
    if difference.any():
        columns.append(torch.tanh(difference / difference.square().mean().sqrt()))
    logit = math.log(found.win_rate / (1 - found.win_rate))
    weights = torch.tensor([logit, found.slope][: len(columns)]).double().requires_grad_()
    assert_optimal(penalised(weights, torch.stack(columns, 1), wins), weights, count)


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
