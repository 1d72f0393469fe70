"""Proportions of a source's rows among the phases, as `data_split` writes them."""

from __future__ import annotations

import math

from dschat.errors import UserError

PHASES = (1, 2, 3)


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
