"""Rewards that check an answer without a model: its number, its form, its length.

`--reward_function` knows them as exact_number, pattern and length; functions of one's own stand
beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from dschat.errors import UserError

Check = Callable[..., list[float | None]]

MARK = "####"  # GSM8K puts it before the result of a worked answer
# A minus after a digit subtracts; thousands may be set off by commas; 1.5e3 is 1500.
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}\b)?")


def final_number(text: str) -> Decimal | None:
    """Find the result that a text states: the number after its last `####`, else its last number.

    `1,234.50`, `$1234.5` and `1234.5` are one number; None where there is none.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    _, mark, result = text.rpartition(MARK)
    found = _NUMBER.findall(result if mark else text)
    return Decimal((found[0] if mark else found[-1]).replace(",", "")) if found else None


def exact_number(
    prompts: Sequence[str], answers: Sequence[str], answer: Sequence[Any]
) -> list[float | None]:
    """Return 1 for an answer whose final number is that of the row's column `answer`, else 0.

    Args:
        answer: numbers, or texts in the form of GSM8K (`... #### 42`) or with the number as their
            last one; a row without (null) gives no score.

    Raises:
        UserError: a row's `answer` holds no number.
    """
    return [
        None if known is None else float(final_number(text) == _truth(known))
        for text, known in zip(answers, answer, strict=True)
    ]


def _truth(value: Any) -> Decimal:
    number = None
    if isinstance(value, str):
        number = final_number(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = Decimal(str(value))
    if number is None or not number.is_finite():
        raise UserError(f"the row's column 'answer' is {value!r}, which holds no number")
    return number


def whole_pattern(expression: str) -> Check:
    """Make a check that gives 1 to an answer that a regular expression fits as a whole, else 0.

    White space at both ends does not count; a dot fits line breaks too.

    Raises:
        UserError: it is no regular expression.
    """
    try:
        fits = re.compile(expression, re.DOTALL).fullmatch
    except re.error as error:
        raise UserError(
            f"reward_pattern {expression!r}: no regular expression ({error})"
        ) from error

    def pattern(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(fits(answer.strip()) is not None) for answer in answers]

    return pattern


def length_within(least: int, most: int) -> Check:
    """Make a check that gives 1 to an answer of `least` to `most` characters, else 0.

    White space at both ends does not count.
    """

    def length(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(least <= len(answer.strip()) <= most) for answer in answers]

    return length
