"""The user's own functions, found by `module:name`; of one, the Example of a row is checked."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dschat.data.files import digest_files
from dschat.errors import UserError, brief
from dschat.text.conversations import Example, Skip, Turn, check_order, read_messages

TARGETS = ("prompt", "chosen", "rejected")
READER = "dataset_function"  # the flag that names it


def load_function(name: str) -> Callable[[Mapping[str, Any]], Example]:
    """The user's function, wrapped so that what it returns becomes an Example.

    Raises:
        UserError: no such module or function.
    """
    function, place = function_of(name, READER), f"--{READER} {name}"

    def read(row: Mapping[str, Any]) -> Example:
        try:
            result = function(dict(row))
        except (UserError, Skip):
            raise
        except Exception as error:  # whatever the user's function raises, with the row's place
            raise UserError(
                f"{place} fails ({brief(error, with_type=True)}); mend it or the row"
            ) from error
        return _as_example(result, place)

    return read


def function_of(name: str, flag: str, *parameters: str) -> Callable[..., Any]:
    """What `module:name` means, a function; that it takes these parameters is checked.

    Args:
        flag: whose value the name is, for messages.

    Raises:
        UserError: no such module or function, or one that is called in another way.
    """
    module, attribute, place = module_of(name, flag), name.partition(":")[2], f"--{flag} {name}"
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{place}: {module.__name__} has no function {attribute!r}")
    if parameters:
        try:
            inspect.signature(function).bind(*parameters)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{place}: it is called as {attribute}({', '.join(parameters)}), which does not "
                f"fit ({brief(error, with_type=True)})"
            ) from error
    return function


def source_digest(name: str, flag: str) -> str:
    """SHA-256 (hex) of the file of a `module:name`; empty for a module without one."""
    file = getattr(module_of(name, flag), "__file__", None)
    return digest_files([Path(file)]) if file else ""


def module_of(name: str, flag: str) -> ModuleType:
    """The module of `module:name`, looked for in the current folder too."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"--{flag} {name}: give module:name, as in my_module:my_function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is read
        raise UserError(
            f"--{flag} {name}: {module_name} does not import ({brief(error, with_type=True)})"
        ) from error
    finally:
        sys.path.remove(here)


def _as_example(result: Any, place: str) -> Example:
    if result is None:
        raise Skip("left out by --dataset_function")
    if isinstance(result, Mapping) and result.keys() <= set(TARGETS) and "prompt" in result:
        result = Example(result["prompt"], result.get("chosen"), result.get("rejected"))
    if not isinstance(result, Example):
        raise UserError(
            f"{place} returned {type(result).__name__}: return an Example, None to leave the row "
            "out, or a dict with prompt and maybe chosen and rejected"
        )
    if isinstance(result.prompt, list):
        turns = read_messages(result.prompt, "prompt")
        result = Example(turns, result.chosen, result.rejected, result.whole)
    _check(result)
    return result


def _check(example: Example) -> None:
    """Stop unless a user's function gave turns that a conversation can have."""
    if not isinstance(example.prompt, tuple):
        return
    for number, turn in enumerate(example.prompt, 1):
        if not isinstance(turn, Turn) or not isinstance(turn.text, str):
            raise UserError(f"column 'prompt', message {number}: is {turn!r}, needs a Turn of text")
    check_order(example.prompt, "prompt")
    if not example.prompt or example.prompt[-1].role != "user":
        raise UserError("column 'prompt' does not end with the user's turn; mend or drop the row")
