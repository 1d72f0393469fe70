"""Places that the main thread comes to, by which `rank_watch` judges and which it reports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Place:
    """Where the main thread is: its how manyth place, and whether it waits there or works."""

    count: int = 0
    name: str = "the start"
    step: int = 0
    waits: bool = False
    works: bool = False
    since: float = field(default_factory=time.monotonic)

    def go(self, name: str, waits: bool) -> None:
        """Come to the next place."""
        self.count, self.name, self.waits = self.count + 1, name, waits
        self.since = time.monotonic()

    def __str__(self) -> str:
        return f"{self.name} of step {self.step}" if self.step else self.name


here = Place()


@contextlib.contextmanager
def waiting(name: str, patient: bool = False) -> Iterator[None]:
    """Mark a place where ranks wait for each other; all of them come to it.

    Args:
        name: such as "a barrier". patient: one of them may work there for hours.
    """
    here.go(name, not patient)
    yield
    here.go(f"the work after {name}", False)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Mark work, without waiting for other ranks, of a rank that these wait for."""
    before = here.works
    here.works, here.since = True, time.monotonic()
    try:
        yield
    finally:
        here.works = before


def in_step(number: int) -> None:
    """Tell the number of the present step, for messages."""
    here.step = number
