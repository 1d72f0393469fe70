"""The two tiers of the suite: a core of each table of cells, and the rest, marked slow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")

# Files that take longest, in folders of tests. They are started first, lest one of them is left to
# a single process at the end while the others have nothing to do.
LONGEST = (
    "training/test_scripts_run.py",
    "training/test_two_nodes.py",
    "docs/test_commands_run.py",
    "training/test_resume.py",
    "training/test_steps.py",
    "training/test_dpo.py",
    "training/test_another_machine.py",
    "training/test_signals.py",
    "training/test_e2e_signals.py",
    "training/test_step3_roles.py",
    "training/test_experts.py",
    "training/test_model_families.py",
    "training/test_errors.py",
    "training/test_e2e_rlhf.py",
    "rlhf/test_ppo_ranks.py",
    "train/test_agreement.py",
    "train/test_scores_ranks.py",
    "benchmarks/test_plan_on_ranks.py",
    "faults/test_faults.py",
    "plan/test_ppo.py",
    "docs/test_commands.py",
)


def position(file: str) -> int:
    """Where a file, by its path below the folder of tests, stands in the order of the tests."""
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


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
