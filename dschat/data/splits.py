"""Splits of a source's rows among the three phases, and into train and test, by a seed."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from dschat.errors import UserError

PHASES = (1, 2, 3)

# Distinct streams of the one seed, so that a held-out test set and a split are independent draws.
_SPLIT_STREAM, _HOLDOUT_STREAM = 1, 2


def parse_proportions(text: str) -> tuple[float, ...]:
    """Read `data_split`: "2,4,4" (one number a phase) or "10" (every row in every phase).

    Raises:
        UserError: another count, not a number, negative, or all zero.
    """
    remedy = 'give three numbers such as "2,4,4", or one for all rows in every phase'
    try:
        proportions = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"data_split {text!r} holds what is not a number: {remedy}") from error
    if len(proportions) not in (1, len(PHASES)):
        raise UserError(f"data_split {text!r} has {len(proportions)} numbers: {remedy}")
    if not all(math.isfinite(value) and value >= 0 for value in proportions):
        raise UserError(f"data_split {text!r} has a negative or infinite number: {remedy}")
    if not any(proportions):
        raise UserError(f"data_split {text!r} is all zero: {remedy}")
    return proportions


def phase_split(size: int, seed: int, proportions: Sequence[float], phase: int) -> np.ndarray:
    """Rows of `phase` (1, 2 or 3) among `size`, as int64 indices in a seeded order.

    Phases do not overlap and together hold every row; each size is within one row of its
    proportion (cumulative rounding). A single proportion gives all rows to every phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(size)
    if len(proportions) == 1:
        return order
    totals = [0.0, *accumulate(proportions)]
    start, end = (
        math.floor(size * totals[bound] / totals[-1] + 0.5) for bound in (phase - 1, phase)
    )
    return order[start:end]


def holdout_split(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of a source without a test set: a tenth, at least one row, is test."""
    order = np.random.default_rng([seed, _HOLDOUT_STREAM]).permutation(size)
    cut = size - max(1, size // 10)
    return order[:cut], order[cut:]
