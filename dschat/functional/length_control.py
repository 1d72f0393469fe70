"""Win rate at equal lengths, by a logistic regression of wins on the difference of length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dschat.functional.proportions import Z95

MOST_STEPS, SMALLEST_STEP, ROUNDING = 500, 1e-10, 1e-14


@dataclass(frozen=True)
class LengthControlled:
    """Win rate between answers of equal length.

    Attributes:
        low, high: 95 % interval, of the logit's standard error.
        slope: of the logit in tanh(difference / its size); above 0, longer answers win.
    """

    win_rate: float
    low: float
    high: float
    slope: float


def length_controlled(
    wins: torch.Tensor, length_difference: torch.Tensor
) -> LengthControlled | None:
    """Fit P(win) = sigmoid(theta + phi tanh(difference / size)) and take it at difference 0.

    Length enters as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475, eq. 2),
    but for the size: the root mean square of the differences, not their deviation, which is the
    same where neither side is longer on the whole; where one always is, tanh would be 1 throughout.
    Its term for the difficulty of each prompt needs other models' answers, and is left out. The
    likelihood has Firth's penalty (1993, Biometrika 80:27), finite where one side always wins.

    Args:
        wins: (N,) 1 won, 0 lost, 0.5 tied.
        length_difference: (N,) tokens of the answer less those of the other.

    Returns:
        None where all differ by the same number of tokens, and that is not 0: nothing tells what
        equal lengths would change.
    """
    difference, wins = length_difference.double(), wins.double()
    design = torch.ones(len(wins), 1, dtype=torch.float64)  # (N, 1 or 2)
    if difference.any():
        if bool((difference == difference[0]).all()):
            return None
        lengths = torch.tanh(difference / difference.square().mean().sqrt())
        design = torch.stack([design[:, 0], lengths], dim=1)
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(MOST_STEPS):
        step = _uphill(design, wins, weights, _newton_step(design, wins, weights) / 2)
        weights = weights + step
        if step.abs().max() < SMALLEST_STEP:
            break
    chance = torch.sigmoid(design @ weights)
    half = Z95 * torch.linalg.inv(_information(design, chance))[0, 0].sqrt()
    low, middle, high = torch.sigmoid(weights[0] + half * torch.tensor([-1, 0, 1])).tolist()
    return LengthControlled(middle, low, high, weights[1].item() if len(weights) > 1 else 0.0)


def _information(design: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Fisher information: X' diag(p (1 - p)) X."""
    return design.T @ (design * (chance * (1 - chance))[:, None])


def _newton_step(design: torch.Tensor, wins: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scoring step of Firth's likelihood: residuals y - p + h (1/2 - p), h the hat diagonal."""
    chance = torch.sigmoid(design @ weights)
    inverse = torch.linalg.inv(_information(design, chance))
    hat = ((design @ inverse) * design).sum(1) * chance * (1 - chance)
    return inverse @ (design.T @ (wins - chance + hat * (0.5 - chance)))


def _uphill(
    design: torch.Tensor, wins: torch.Tensor, weights: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Halve a step until the likelihood does not fall.

    Of few verdicts a whole scoring step swings to and fro: it leaves out the penalty's curvature.
    """
    start = _penalised_likelihood(design, wins, weights)
    while step.abs().max() >= SMALLEST_STEP:
        if _penalised_likelihood(design, wins, weights + step) >= start - ROUNDING * abs(start):
            break
        step = step / 2
    return step


def _penalised_likelihood(design: torch.Tensor, wins: torch.Tensor, weights: torch.Tensor) -> float:
    """Log likelihood and half the log determinant of the information, -inf where it is singular."""
    logits = design @ weights
    chosen = wins * F.logsigmoid(logits) + (1 - wins) * F.logsigmoid(-logits)
    penalty = torch.logdet(_information(design, torch.sigmoid(logits))) / 2
    return torch.nan_to_num(chosen.sum() + penalty, nan=-math.inf).item()
