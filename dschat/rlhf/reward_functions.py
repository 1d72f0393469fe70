"""Reward functions: the user's own, in either form, and the built-in checks; values are checked.

    def reward(prompts, answers, **columns) -> list[float | None]     of a whole batch
    def reward(prompt, answer) -> float                               of one answer

`prompts` and `answers` are lists of texts; each keyword is a list of the values that the rows have
in the column of this name. None is no score: what is not scored teaches nothing.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dschat.data.columns import KeptColumns
from dschat.errors import UserError, brief
from dschat.rlhf import checks
from dschat.rlhf.part_config import RewardConfig
from dschat.utils.user_functions import load_function, source_digest

FLAG = "reward_function"
FORM = ("prompts", "answers")  # the names by which a function of batches is known
NEAR = {*FORM, "completions"}
SHOWN_CHARACTERS = 80  # of a text in a message
LARGEST = torch.finfo(torch.float32).max
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class RewardFunction:
    """A function that scores answers; build with `load`, or `of` where it is at hand.

    Attributes:
        name: module:name, or that of a built-in check. digest: of its source file.
        columns: of a function of batches, the rows' columns that it takes.
    """

    name: str
    function: Callable[..., Any]
    digest: str = ""
    takes_batches: bool = False
    columns: KeptColumns = KeptColumns()

    @classmethod
    def load(cls, name: str) -> RewardFunction:
        """Import `module:name`.

        Raises:
            UserError: no such module or function, or one of neither form.
        """
        return cls.of(name, load_function(name, FLAG), source_digest(name, FLAG))

    @classmethod
    def of(cls, name: str, function: Callable[..., Any], digest: str = "") -> RewardFunction:
        """Find the form of a function from its parameters.

        Raises:
            UserError: it has neither.
        """
        called = getattr(function, "__name__", name.partition(":")[2])
        try:
            signature = inspect.signature(function)
            names = list(signature.parameters)
            if tuple(names[:2]) == FORM:
                columns = _columns(signature, name)
                signature.bind([], [], **dict.fromkeys(columns.needed))
                return cls(name, function, digest, takes_batches=True, columns=columns)
            signature.bind("prompt", "answer")
        except (TypeError, ValueError) as error:
            wanted = f"{called}(prompt, answer)"
            raise UserError(
                f"{FLAG} {name}: it is called as {wanted}, which does not fit "
                f"({brief(error, with_type=True)}); a function of batches is "
                f"{called}(prompts, answers, **columns)"
            ) from error
        if NEAR & set(names):
            raise UserError(
                f"{FLAG} {name}: its parameters are {', '.join(names)}; a function of batches is "
                f"{called}(prompts, answers, **columns), by these names, one of single texts "
                f"{called}(prompt, answer)"
            )
        return cls(name, function, digest)

    @property
    def short_name(self) -> str:
        """The name without its module."""
        return self.name.rpartition(":")[2]

    def scores(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float | None]:
        """Score answers, one number or None for each.

        Args:
            rows: their own columns, by name.

        Raises:
            UserError: the function fails, or returns something else; names it, prompt and answer.
        """
        if not answers:
            return []
        if self.takes_batches:
            return self._of_batch(list(prompts), list(answers), rows or [{}] * len(answers))
        return [self._of_one(*texts) for texts in zip(prompts, answers, strict=True)]

    def _of_one(self, prompt: str, answer: str) -> float:
        value = _plain(self._called(_place(prompt, answer), prompt, answer))
        return self._number(value, prompt, answer, "return a finite number")

    def _of_batch(
        self, prompts: list[str], answers: list[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        count, taken = len(answers), self.columns
        names = {*taken.needed, *taken.others}
        named = {key: None for row in rows for key in row if taken.everything or key in names}
        columns = {name: [row.get(name) for row in rows] for name in named}
        place = f"for {count} answers, the first {_place(prompts[0], answers[0])}"
        values = _plain(self._called(place, list(prompts), list(answers), **columns))
        wanted = f"return a list of {count} numbers, None for an answer without a score"
        if not isinstance(values, list | tuple):
            raise UserError(
                f"{FLAG} {self.name} returned {_tail(repr(values))} for {count} answers: {wanted}"
            )
        if len(values) != count:
            raise UserError(
                f"{FLAG} {self.name} returned {len(values)} scores for {count} answers: {wanted}"
            )
        return [
            None if value is None else self._number(value, prompt, answer, wanted)
            for value, prompt, answer in zip(map(_plain, values), prompts, answers, strict=True)
        ]

    def _called(self, place: str, *args: Any, **columns: Any) -> Any:
        try:
            return self.function(*args, **columns)
        except UserError as error:  # a built-in check's
            raise UserError(f"{FLAG} {self.name}: {error}") from error
        except BaseException as error:  # anything that it raises, with its row
            raise UserError(
                f"{FLAG} {self.name} fails ({brief(error, with_type=True)}) {place}"
            ) from error

    def _number(self, value: Any, prompt: str, answer: str, wanted: str) -> float:
        # A NaN is not below anything; scores are fp32.
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:  # type: ignore[operator]
            shown = repr(value)[:SHOWN_CHARACTERS]
            raise UserError(
                f"{FLAG} {self.name} returned {shown} {_place(prompt, answer)}: {wanted}"
            )
        return float(value)


def _plain(value: Any) -> Any:
    """Convert an array or a tensor to numbers; return anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def _columns(signature: inspect.Signature, name: str) -> KeptColumns:
    """List the columns that a function of batches takes: those after its first two arguments."""
    further = list(signature.parameters.values())[2:]
    named = [p for p in further if p.kind in BY_NAME]
    return KeptColumns(
        needed=tuple(p.name for p in named if p.default is p.empty),
        others=tuple(p.name for p in named if p.default is not p.empty),
        everything=any(p.kind is p.VAR_KEYWORD for p in further),
        reserved=FORM,
        asked_by=f"{FLAG} {name}",
    )


def load_functions(config: RewardConfig) -> tuple[RewardFunction, ...]:
    """Make the functions of a run, in their order: built-in checks, and imported ones.

    Raises:
        UserError: no such module or function, one of no form that is known, or a `reward_pattern`
            that is no regular expression.
    """
    functions = []
    for name in config.reward_function:
        if name == "exact_number":
            functions.append(RewardFunction.of(name, checks.exact_number))
        elif name == "pattern":
            check = checks.whole_pattern(str(config.reward_pattern))
            functions.append(RewardFunction.of(name, check))
        elif name == "length":
            check = checks.length_within(*config.reward_length)
            functions.append(RewardFunction.of(name, check))
        else:
            functions.append(RewardFunction.load(name))
    return tuple(functions)


def all_columns(functions: Sequence[RewardFunction]) -> KeptColumns:
    """Join the columns that several functions take."""
    asked = [f.columns for f in functions if f.columns]
    return KeptColumns(
        needed=tuple(sorted({name for c in asked for name in c.needed})),
        others=tuple(sorted({name for c in asked for name in c.others})),
        everything=any(c.everything for c in asked),
        reserved=FORM if asked else (),
        asked_by=", ".join(c.asked_by for c in asked),
    )


def _place(prompt: str, answer: str) -> str:
    return f"for the prompt {_tail(prompt)} and the answer {_tail(answer)}"


def _tail(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"…{text[1 - SHOWN_CHARACTERS :]}")
