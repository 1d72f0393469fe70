"""Values of a row by a column's name, by the path of a field inside one, or kept as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dschat.errors import UserError
from dschat.text.conversations import Skip, kind_of

if TYPE_CHECKING:
    import torch

Row = Mapping[str, Any]
OwnColumns = tuple[dict[str, Any], ...]  # of each row of a batch, by name


def pick(row: Row, path: str) -> Any:
    """Read the value of a column, or of a field inside one: `question.full_text`, `answers.0.text`.

    A list that is too short, or nothing where a field should be, gives None.

    Raises:
        UserError: there is no such column or field.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        elif value is None:
            return None
        else:
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"no column {path!r} (columns: {columns}); name another with --dataset_columns"
            )
    return value


def pick_text(row: Row, path: str) -> str:
    """Read the text at a path.

    Raises:
        Skip: nothing is there. UserError: something else than text is.
    """
    value = pick(row, path)
    if value is None or value == "":
        raise Skip(f"no {path}")
    if not isinstance(value, str):
        raise UserError(f"column {path!r} is {kind_of(value)}, needs text; fix or drop the row")
    return value


def pick_number(row: Row, path: str) -> float:
    """Read the number at a path, also where it is written as text; else a UserError."""
    value = pick(row, path)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"column {path!r} is {value!r}, needs a number; fix the row")
    return number


@dataclass(frozen=True)
class KeptColumns:
    """Which of a row's own columns stay with its prompt, for what will judge the answers.

    Attributes:
        needed: columns that every row must have. others: kept where a row has them.
        everything: all further columns are kept too, except those called `reserved`.
        asked_by: what takes them, for messages.
    """

    needed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    everything: bool = False
    reserved: tuple[str, ...] = ()
    asked_by: str = ""

    def __bool__(self) -> bool:
        return bool(self.needed or self.others or self.everything)

    def key(self) -> str:
        """What kept rows depend on, as text."""
        return json.dumps([sorted(self.needed), sorted(self.others), self.everything])

    def of(self, row: Row) -> str:
        """Write these columns of a row as a JSON object, which reads back as the same values.

        Raises:
            UserError: a column is missing, has a name that is taken, or holds no plain values.
        """
        for name in self.needed:
            if name not in row:
                columns = ", ".join(map(str, row)) or "none"
                raise UserError(
                    f"no column {name!r}, which {self.asked_by} takes (columns: {columns}); add "
                    "it to the rows"
                )
        names = row.keys() if self.everything else [n for n in row if n in self._named]
        for name in names:
            if name in self.reserved:
                raise UserError(
                    f"column {name!r}: {self.asked_by} has an argument of this name; rename the "
                    "column, or have the function name the columns that it takes"
                )
        return json.dumps({name: self._plain(name, row[name]) for name in names})

    @property
    def _named(self) -> frozenset[str]:
        return frozenset(self.needed + self.others)

    def _plain(self, name: str, value: Any) -> Any:
        """Give a value that JSON can hold; else stop."""
        try:
            same = json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            same = None
        if repr(same) != repr(value):  # keys that are no text become text
            raise UserError(
                f"column {name!r} is {kind_of(value)}: {self.asked_by} can take text, numbers, "
                "true and false, lists and objects; have the function name the columns that it "
                "takes, or drop the column"
            )
        return value


def picked(columns: OwnColumns | None, index: torch.Tensor) -> OwnColumns | None:
    """Pick the own columns of the rows of `index`, (N,) int64; None where none are kept."""
    return None if columns is None else tuple(columns[at] for at in index.tolist())
