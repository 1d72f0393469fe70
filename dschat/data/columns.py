"""Values of a row by the name of a column, or by the path of a field inside one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dschat.errors import UserError
from dschat.text.conversations import Skip, kind_of

Row = Mapping[str, Any]


def pick(row: Row, path: str) -> Any:
    """Take the value of a column, or of a field inside one: `question.full_text`, `answers.0.text`.

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
    """Take the text at a path.

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
    """Take the number at a path, also where it is written as text; else a UserError."""
    value = pick(row, path)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"column {path!r} is {value!r}, needs a number; fix the row")
    return number
