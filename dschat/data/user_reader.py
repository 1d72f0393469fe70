"""The user's own way to read rows: columns by name, or a function whose result is checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dschat.data.columns import KeptColumns, Row, pick
from dschat.data.readers import pair_columns, read_standard
from dschat.errors import UserError, brief
from dschat.settings import Settings, setting
from dschat.text.conversations import (
    Example,
    Skip,
    Turn,
    check_order,
    has_markers,
    question,
    read_messages,
)
from dschat.utils.user_functions import load_function

TARGETS = ("prompt", "chosen", "rejected", "margin", "subset")
READER = "dataset_function"  # the setting that names it


@dataclass(frozen=True)
class ReadOptions(Settings):
    """The user's choice of how rows are read, in place of the formats known here.

    Attributes:
        kept: columns of the rows themselves that stay with their prompts; no flag, what judges the
            answers knows it.
    """

    dataset_columns: tuple[str, ...] = setting(
        (),
        "which columns hold what: prompt=question.text chosen=best rejected=worst, of pairs maybe "
        "margin=... subset=... (default: recognised)",
    )
    dataset_function: str | None = setting(
        None, "module:name of your function from a row to prompt, chosen, rejected"
    )
    kept: KeptColumns | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_columns and self.dataset_function:
            raise UserError("dataset_columns and dataset_function contradict: drop one")
        targets = [text.partition("=")[0] for text in self.dataset_columns]
        for text, target in zip(self.dataset_columns, targets, strict=True):
            if target not in TARGETS or not text.partition("=")[2] or targets.count(target) > 1:
                raise UserError(
                    f"dataset_columns {text!r}: give prompt=COLUMN, and chosen=COLUMN, "
                    "rejected=COLUMN, margin=COLUMN and subset=COLUMN as far as there are such, "
                    "each once"
                )
        if self.dataset_columns and "prompt" not in targets:
            raise UserError("dataset_columns names no prompt: add prompt=COLUMN")


def read_mapped(columns: tuple[str, ...], row: Row) -> Example:
    """Read a row by the user's own columns, each as in `prompt=question.text`."""
    paths = (text.partition("=") for text in columns)
    example = read_standard({target: pick(row, path) for target, _, path in paths})
    if isinstance(example.prompt, str) and not has_markers(example.prompt):
        # Only a column that is called prompt is trusted to be in the format already.
        return replace(example, prompt=question(example.prompt))
    return example


def user_reader(name: str) -> Callable[[Mapping[str, Any]], Example]:
    """Wrap the user's function `module:name`, so that its result becomes an Example.

    Raises:
        UserError: no such module or function.
    """
    function, place = load_function(name, READER), f"{READER} {name}"

    def read(row: Mapping[str, Any]) -> Example:
        try:
            result = function(dict(row))
        except (UserError, Skip):
            raise
        except BaseException as error:  # whatever the user's function raises, with the row's place
            reason = brief(error, with_type=True)
            raise UserError(f"{place} fails ({reason}); fix it or the row") from error
        return _as_example(result, place)

    return read


def _as_example(result: Any, place: str) -> Example:
    if result is None:
        raise Skip("left out by dataset_function")
    if isinstance(result, Mapping) and result.keys() <= set(TARGETS) and "prompt" in result:
        sides = result.get("chosen"), result.get("rejected")
        result = Example(result["prompt"], *sides, **pair_columns(result))
    if not isinstance(result, Example):
        raise UserError(
            f"{place} returned {type(result).__name__}: return an Example, None to leave the row "
            "out, or a dict with prompt and maybe chosen, rejected, margin and subset"
        )
    if isinstance(result.prompt, list):
        turns = read_messages(result.prompt, "prompt")
        result = replace(result, prompt=turns)
    _check(result)
    return result


def _check(example: Example) -> None:
    """Refuse turns that no conversation can have."""
    if not isinstance(example.prompt, tuple):
        return
    for number, turn in enumerate(example.prompt, 1):
        if not isinstance(turn, Turn) or not isinstance(turn.text, str):
            raise UserError(f"column 'prompt', message {number}: is {turn!r}, needs a Turn of text")
    check_order(example.prompt, "prompt")
    if not example.prompt or example.prompt[-1].role != "user":
        raise UserError("column 'prompt' does not end with the user's turn; fix or drop the row")
