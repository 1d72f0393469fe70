"""Shares and probabilities held against outcomes: intervals and calibration, of plain tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dschat.lazy import torch

Z95 = 1.959963984540054  # standard normal, two-sided 95 %
BINS = 10


def wilson_interval(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, JASA 22:209); (0, 1) without trials.

    Args:
        successes: out of `trials`; a tie may count as half.
    """
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions whose confidence lies in [low, high): their number, mean confidence, accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(
    confidence: torch.Tensor, right: torch.Tensor, bins: int = BINS
) -> list[ReliabilityBin]:
    """Sort predictions of one of two outcomes into bins of equal width over [0.5, 1].

    Args:
        confidence: (N,) probability of the predicted outcome.
        right: (N,) 1 where it came true, 0 where not, 0.5 where nothing was predicted.

    Returns:
        The bins that hold any, from the least confident.
    """
    width = 0.5 / bins
    places = ((confidence - 0.5) / width).long().clamp(0, bins - 1)  # (N,)
    made = []
    for number in range(bins):
        inside = places == number
        if count := int(inside.sum()):
            means = (x[inside].double().mean().item() for x in (confidence, right))
            low, high = (round(0.5 + width * n, 10) for n in (number, number + 1))
            made.append(ReliabilityBin(low, high, count, *means))
    return made


def calibration_error(bins: list[ReliabilityBin]) -> float:
    """Expected calibration error: mean |accuracy - confidence| of the bins, by their counts.

    Guo et al. 2017 (arXiv:1706.04599), eq. 3.
    """
    total = sum(part.count for part in bins)
    gaps = sum(part.count * abs(part.accuracy - part.confidence) for part in bins)
    return gaps / max(total, 1)
