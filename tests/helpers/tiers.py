"""The two tiers of the suite: a core of each table of cells, and the rest, marked slow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")


def tiers(names: Iterable[str], core: Collection[str]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: every name, slow unless it is in `core`."""
    names = list(names)
    assert set(core) <= set(names), f"no such cells: {set(core) - set(names)}"
    return [name if name in core else pytest.param(name, marks=pytest.mark.slow) for name in names]


def by_tier(
    names: Iterable[str], core: Collection[str], run: Callable[[list[str]], dict[str, Result]]
) -> Callable[[str], Result]:
    """Results of cells that are run many at a time, the core apart from the rest.

    Args:
        run: name → result of the cells it is given; called once a tier, when a result of that tier
            is first asked for, so that a fast test never waits for slow cells.
    """
    names = list(names)

    @cache
    def results(is_core: bool) -> dict[str, Result]:
        return run([name for name in names if (name in core) == is_core])

    return lambda name: results(name in core)[name]
