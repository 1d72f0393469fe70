"""The one error a user can cause: bad input, reported in one line before work starts."""

import json
from collections import Counter
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the value, the place and the remedy, on one line.

    Entry points turn it into `error: <message>` on stderr and exit code 2 (see `cli.run_cli`).
    """


def brief(error: BaseException, with_type: bool = False) -> str:
    """Reduce an error to the first line of its message, or to its type where it has none.

    A line that ends in a colon takes the next one along.

    Args:
        with_type: put the type before the message.
    """
    kind, message = type(error).__name__, str(error).strip()
    if not message:
        return kind
    line, *rest = message.splitlines()
    if rest and line.endswith(":"):
        line += f" {rest[0].strip()}"
    return f"{kind}: {line}" if with_type else line


class RepeatedKeyError(ValueError):
    """A `key` that stands `count` times in one JSON object; a reader would take its last value."""

    def __init__(self, key: str, count: int):
        super().__init__(f"the key {key!r} stands twice")
        self.key, self.count = key, count


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON, as `object_pairs_hook` of `json.loads`.

    Raises:
        RepeatedKeyError: the first key that stands in it more than once.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        raise RepeatedKeyError(key, counts[key])
    return entries


def parse_json(text: str) -> Any:
    """Read JSON from outside, whose objects hold each key once.

    Raises:
        RepeatedKeyError: a key stands twice.
        ValueError: no JSON, or nested more deeply than it can be read.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
