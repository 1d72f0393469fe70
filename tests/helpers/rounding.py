"""How far rounding may take two fp32 trainings apart that add the same numbers in other orders."""

from __future__ import annotations

from collections.abc import Iterable

ROUNDING = 2.0**-24  # relative error of one fp32 operation
# A gradient, a logit or a value of the tiny models has come through about 64 operations in a row,
# whose errors add up like a random walk.
IN_A_ROW = 64**0.5 * ROUNDING
# Logits, values and log-probabilities are below 20. Their means, as losses, are no further off.
LOGITS = 20 * IN_A_ROW
# Literal tolerances of the tests stand for these, where no comment says otherwise:
# 1e-12  fp64 numbers: 2^-53 of 100 is 1.1e-14, some tens of times.
# 1e-7   fp32 numbers near 1: one rounding, 2^-24 = 6e-8.
# 1e-6   fp32 numbers near 1: 16 roundings, 16 * 2^-24 = 9.5e-7; 2e-6 between two such.
# 1e-5   what a model computes: LOGITS = 20 * 8 * 2^-24 = 9.5e-6; 2e-5 for a log-probability, which
#        is a logit less the log of a sum over the vocabulary.
# 1e-4   gradients, relative: sums of terms that cancel to 1/200, 200 * IN_A_ROW = 9.5e-5.


def path_tolerance(rates: Iterable[float], eps: float, max_norm: float) -> float:
    """Largest norm of a tensor's difference after steps of Adam; `weight_rtol` comes on top.

    A step moves a weight by rate * m / (s + eps), where m is a mean of the gradients so far and s
    their root mean square. Gradients that differ by d change m and s by at most d, so the quotient
    by at most d / (s + eps) + |m| d / (s + eps)^2. With |m| <= s, and s / (s + eps)^2 at its
    largest where s = eps, that is 1.25 d / eps: a small eps turns rounding into movement, and
    LoRA+ does so 16 times more in B than in A. Over all weights d is of norm IN_A_ROW * max_norm.
    To first order: how a distance changes later gradients is not counted.

    Args:
        rates: learning rate of the tensor, for each step.
        eps: Adam's.
        max_norm: gradients are clipped to it.
    """
    return 1.25 * IN_A_ROW * max_norm / eps * sum(rates)


def adam_tolerance(rates: Iterable[float], eps: float, max_norm: float) -> float:
    """Largest distance of one weight: an eighth of the norm.

    That is five times the even share of each of n weights, 1 / sqrt(n): n is at least 1,792, the
    adapters' B of a tiny model.
    """
    return path_tolerance(rates, eps, max_norm) / 8


def weight_rtol(steps: int) -> float:
    """Relative distance of weights that are rounded when stored, after every step on each side."""
    return 2 * steps * ROUNDING
