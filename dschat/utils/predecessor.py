"""Names and calls of DeepSpeed-Chat that changed: an error of one line that says how.

docs/migration.md lists them all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")
Class = TypeVar("Class")

SEE = "see docs/migration.md, Python names"


def moved(module: str, places: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Make the `__getattr__` of a module that has lost names.

    Args:
        places: where each of them went, or what does its work.
    """

    def look_up(name: str) -> NoReturn:
        if name in places:
            # An AttributeError would become Python's own message.
            raise ImportError(f"{module}.{name} of DeepSpeed-Chat is now {places[name]}; {SEE}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up


def changed(
    now: str, **types: type | tuple[type, ...]
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Let a function whose arguments changed say so to a call that is made the old way.

    Args:
        now: a call as it is to be written.
        types: of arguments that an old call fills with something else, by their names.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            reason = _misfit(signature, types, args, kwargs)
            if reason is not None:
                raise TypeError(f"{reason}; DeepSpeed-Chat's arguments changed to {now}; {SEE}")
            return function(*args, **kwargs)

        return call

    return decorate


def changed_class(now: str) -> Callable[[type[Class]], type[Class]]:
    """Do the same for a class that is made of other arguments now."""

    def decorate(cls: type[Class]) -> type[Class]:
        setattr(cls, "__init__", changed(now)(cls.__init__))  # noqa: B010
        return cls

    return decorate


def _misfit(
    signature: inspect.Signature,
    types: Mapping[str, type | tuple[type, ...]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """Explain why these arguments do not fit; None where they do."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        return str(error)
    for name, wanted in types.items():
        if name in given and not isinstance(given[name], wanted):
            return f"{name} is of type {type(given[name]).__name__}"
    return None
