"""How far rounding may take two computations of the same numbers apart: the tests' tolerances.

The unit roundoff u is the largest relative error of one operation. A chain of n operations on
numbers up to x is off by at most n u x if all errors have one sign, and by about sqrt(n) u x as
they do not. A tolerance in a test is one of the names below, an expression of them, or a number
with its arithmetic in a comment; `tests/test_suite.py` sees to it. The defaults of the libraries
are no exceptions: `pytest.approx` allows a relative 1e-6, which is NEAR_ONE, and
`torch.testing.assert_close` an absolute 1e-5 for fp32, which is LOGITS.
"""

from __future__ import annotations

from collections.abc import Iterable

ROUNDING = 2.0**-24  # unit roundoff of fp32
ROUNDING_64 = 2.0**-53
ROUNDING_FP16 = 2.0**-11
# A figure that Python computes from a handful of numbers, relative: 16 operations, 1.8e-15.
FIGURE = 16 * ROUNDING_64
# An fp32 number near 1 from a handful of others: 16 operations, 9.5e-7.
NEAR_ONE = 16 * ROUNDING
# A gradient, a logit or a value of the tiny models has come through about 64 operations in a row,
# whose errors add up like a random walk.
IN_A_ROW = 64**0.5 * ROUNDING
# Logits, values, scores and the terms that a gradient adds up are below 20:
# 20 * 8 * 2^-24 = 9.5e-6. Means are no further off.
LOGITS = 20 * IN_A_ROW
# A log-probability is a logit less the log of a sum over the vocabulary: 1.9e-5.
LOGPROBS = 2 * LOGITS
# Gradients, relative to an entry: sums of terms that cancel to 1/200, 200 * 8 * 2^-24 = 9.5e-5.
GRADIENTS = 200 * IN_A_ROW
# The least difference between models that compute something else: no rounding is 100 times as
# large, 9.5e-4.
DIFFERENT = 100 * LOGITS
# The same for weights, which are below 1 and rounded once a step: 1,000 roundings, 6.0e-5.
MOVED = 1000 * ROUNDING


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
