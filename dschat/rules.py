"""Rules of single settings: types, bounds and choices, and the line on a value that breaks one."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from dschat.errors import UserError

# The largest number of a setting without an upper bound: what every library takes for an int, and
# what fp32 can still square and multiply.
LARGEST = {int: 2**31 - 1, float: 10**9}


@dataclass(frozen=True)
class Kind:
    """A setting's type: the type of one value, whether it is a tuple of them, or may be None."""

    element: type
    is_tuple: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Rule:
    """Rule of a setting, beside its type and its default.

    Attributes:
        help: one line; may hold fields like {full_rate}: other fields of the same group.
        at_least, above, at_most, below: bounds of a number, or of each number of a tuple.
        choices: the values allowed, or of a tuple its elements.
        may_change: a resumed run may give another value than the first one.
        may_be_empty: a tuple's flag may stand without a value.
        bare: the value of a flag that stands without one; None: it needs one.
        retired: accepted without effect; its help says why.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None
    may_change: bool = False
    may_be_empty: bool = False
    bare: str | None = None
    retired: bool = False

    def check(self, name: str, value: Any, kind: Kind) -> None:
        """Stop at a value that this setting cannot have.

        Raises:
            UserError: naming the setting, its value and what it may be.
        """
        if value is None and kind.is_optional:
            return
        if kind.is_tuple and not isinstance(value, tuple):
            raise UserError(f"{name} is {value!r}: give a list of values")
        for item in value if kind.is_tuple else (value,):
            if self.choices is not None and item not in self.choices:
                known = ", ".join(str(choice) for choice in self.choices)
                raise UserError(f"{name} is {item}: choose one of {known}")
            if item == "":
                empty = "holds an empty text" if kind.is_tuple else "is empty"
                raise UserError(f"{name} {empty}: give a value, or leave it out")
            if not self._holds(item, kind.element):
                is_text = isinstance(item, str)  # "8" would look like the number
                shown = repr(item) if is_text and kind.element in LARGEST else item
                if kind.element is int and not is_text and not isinstance(item, int):
                    raise UserError(f"{name} is {shown}: give a whole number")
                raise UserError(f"{name} is {shown}: give {self.wanted(kind.element)}")
            largest = math.inf if self._is_bounded else LARGEST.get(kind.element, math.inf)
            if kind.element in LARGEST and abs(item) > largest:
                raise UserError(f"{name} is {item}: give at most {largest} in size")

    def _holds(self, value: Any, kind: type) -> bool:
        if kind not in (int, float):
            return isinstance(value, (kind, os.PathLike) if kind is str else kind)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (kind is float or isinstance(value, int))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def _is_bounded(self) -> bool:
        return self.at_most is not None or self.below is not None

    def wanted(self, kind: type) -> str:
        """The values of a type that are allowed, in words."""
        if kind not in (int, float):
            return "True or False" if kind is bool else "text"
        a_number = "a whole number" if kind is int else "a number"
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if high is not None and low is not None:
            opening = "[" if self.at_least is not None else "("
            closing = "]" if self.at_most is not None else ")"
            return f"{a_number} in {opening}{low:g}, {high:g}{closing}"
        if high is not None:
            return f"at most {high:g}" if self.at_most is not None else f"{a_number} below {high:g}"
        if self.at_least is not None:
            return "0 or more" if low == 0 else f"at least {low:g}"
        return f"{a_number} above {low:g}" if low is not None else f"a finite {a_number[2:]}"
