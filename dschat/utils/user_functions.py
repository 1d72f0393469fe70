"""Functions of the user, found by `module:name`."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dschat.errors import UserError, brief


def load_function(name: str, setting: str, *parameters: str) -> Callable[..., Any]:
    """Import the function that `module:name` means, and check that it takes these parameters.

    Args:
        setting: whose value the name is, for messages.

    Raises:
        UserError: no such module or function, or one that is called in another way.
    """
    module, attribute, place = _module(name, setting), name.partition(":")[2], f"{setting} {name}"
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


def source_digest(name: str, setting: str) -> str:
    """SHA-256 (hex) of the file of a `module:name`; empty for a module without one."""
    file = getattr(_module(name, setting), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() + b"\0").hexdigest() if file else ""


def _module(name: str, setting: str) -> ModuleType:
    """Import the module of `module:name`, looked for in the current folder too."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{setting} {name}: give module:name, as in my_module:my_function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except BaseException as error:  # whatever the user's module raises while it is read
        reason = brief(error, with_type=True)
        raise UserError(f"{setting} {name}: {module_name} does not import ({reason})") from error
    finally:
        sys.path.remove(here)
