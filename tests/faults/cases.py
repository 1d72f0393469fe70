"""Every fault that is tried, as a case with a name that says all of it.

A name such as `sft-z0-r1 kill 7` is layout, kind and parameters. What a case draws at random it
draws from its name, so the name alone repeats it (the clock and two ranks' order apart).
"""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from tests.faults.programs import Layout, layouts

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
DAMAGES = ("first", "middle", "end", "truncate", "remove")
# Folders whose files are damaged one by one: the newest of two checkpoints, the only one, what the
# run reads.
TARGETS = ("checkpoint", "only-checkpoint", "model", "cache")


@dataclass(frozen=True)
class Case:
    """A fault in a layout."""

    layout: Layout
    kind: str
    words: tuple[str, ...]

    @classmethod
    def named(cls, name: str) -> Case:
        """Read a case's name."""
        layout, kind, *words = name.split()
        return cls(Layout.named(layout), kind, tuple(words))

    @property
    def name(self) -> str:
        """Everything that decides the case."""
        return " ".join((self.layout.name, self.kind, *self.words))

    def random(self) -> random.Random:
        """A generator that the name seeds."""
        return random.Random(self.name)

    @property
    def value(self) -> int:
        """Number of the errno or signal that the first word names."""
        return int(getattr(errno if self.kind == "error" else signal, self.words[0]))


def _spread(kind: str, count: int, *words: str, of: list[Layout]) -> Iterator[Case]:
    """So many numbered cases, dealt out among layouts in turn."""
    for number in range(count):
        yield Case(of[number % len(of)], kind, (*words, str(number)))


def _weighted(programs: tuple[str, ...] | None = None) -> list[Layout]:
    """All layouts, the quick ones more often: those of PPO take several times as long."""
    found = layouts(programs)
    return [*(lay for lay in found if lay.program != "ppo"), *found]


def long_form() -> list[Case]:
    """All cases of `make faults`, mixed, so that whatever is cut short has tried some of each."""
    everywhere = _weighted()
    cases = [*_spread("kill", 220, of=everywhere)]
    for name, count in zip(ERRORS, (36, 10, 6, 4), strict=True):
        cases += _spread("error", count, name, of=everywhere)
    for name in SIGNALS:
        cases += _spread("signal", 10, name, of=everywhere)
    two_ranks = [lay for lay in everywhere if lay.ranks == 2]
    cases += _spread("signal-one", 6, "SIGTERM", of=two_ranks)
    cases += _spread("lost-rank", 6, of=two_ranks)
    for layout in layouts():
        one_of_each = layout.ranks == 1 and layout.stage in (0, 2)
        if one_of_each or layout.name == "sft-z3-r2":
            cases += [Case(layout, "damage", ("checkpoint", how, "all")) for how in DAMAGES]
        if layout.ranks == 1 and layout.stage == 0:
            cases += [
                Case(layout, "damage", (target, how, "all"))
                for target in TARGETS[1:]
                for how in DAMAGES
            ]
    random.Random(0).shuffle(cases)
    return cases


def middle_form() -> list[Case]:
    """Cases of the slow tests: some of each kind, in seconds."""
    checkpoint = "out/checkpoints/step-000006"
    names = [
        *("sft-z0-r1 kill 1", "sft-over-z0-r1 kill 1", "sft-z2-r2 kill 1"),
        *("sft-z0-r1 signal SIGTERM 1", "sft-z2-r2 signal SIGUSR1 1"),
        f"sft-z0-r1 damage checkpoint middle {checkpoint}/model/mp_rank_00_model_states.pt",
        f"sft-z0-r1 damage checkpoint truncate {checkpoint}/random-rank-0000.pt",
        f"sft-z0-r1 damage only-checkpoint end {checkpoint}/state.json",
    ]
    return [Case.named(name) for name in names]
