"""Win rate at equal lengths, by a logistic regression of wins on the difference of length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dschat.functional.proportions import Z95

MOST_STEPS, LARGEST_STEP = 200, 2.0


@dataclass(frozen=True)
class LengthControlled:
    """Win rate between answers of equal length.

    Attributes:
        low, high: 95 % interval, of the logit's standard error.
        slope: of the logit in tanh(difference / its spread); above 0, longer answers win.
    """

    win_rate: float
    low: float
    high: float
    slope: float


def length_controlled(wins: torch.Tensor, length_difference: torch.Tensor) -> LengthControlled:
    """Fit P(win) = sigmoid(theta + phi tanh(difference / spread)) and take it at difference 0.

    Length enters as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475, eq. 2);
    its term for the difficulty of each prompt needs other models' answers, and is left out. The
    likelihood has Firth's penalty (1993, Biometrika 80:27), finite where one side always wins.

    Args:
        wins: (N,) 1 won, 0 lost, 0.5 tied.
        length_difference: (N,) tokens of the answer less those of the other.
    """
    difference = length_difference.double()
    spread = difference.std(correction=0).item()
    columns = [torch.ones_like(difference)]
    if spread:
        columns.append(torch.tanh(difference / spread))
    design, wins = torch.stack(columns, dim=1), wins.double()  # (N, 1 or 2)
    if spread and torch.linalg.matrix_rank(design) < 2:  # all differ alike: nothing to tell apart
        design = design[:, :1]
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(MOST_STEPS):
        step = _newton_step(design, wins, weights)
        weights = weights + step.clamp(-LARGEST_STEP, LARGEST_STEP)
        if step.abs().max() < 1e-10:
            break
    chance = torch.sigmoid(design @ weights)
    variance = torch.linalg.inv(_information(design, chance))[0, 0].item()
    logit, half = weights[0].item(), Z95 * math.sqrt(variance)
    low, middle, high = (_sigmoid(x) for x in (logit - half, logit, logit + half))
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


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
