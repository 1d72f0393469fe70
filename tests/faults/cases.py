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

from tests.faults.programs import PROGRAMS, Layout, layouts

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
DAMAGES = ("first", "middle", "end", "truncate", "short", "empty", "remove")
# Folders whose files are damaged one by one: the newest of two checkpoints, the only one, what the
# run reads, and what it appends to.
TARGETS = ("checkpoint", "only-checkpoint", "model", "cache", "output")


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


VARIANTS = ("sft-over", "sft-adapter")  # of SFT: how it writes its result, which is rarely aimed at


def _spread(kind: str, count: int, *words: str, of: list[Layout]) -> list[Case]:
    """So many numbered cases, dealt out among all layouts before any gets another."""
    order = random.Random(f"{kind} {words}").sample(of, len(of))
    return [Case(order[n % len(of)], kind, (*words, str(n))) for n in range(count)]


def _damage() -> Iterator[list[Case]]:
    """Every file of a checkpoint of each program, one rank at all stages and two at ZeRO-3.

    The other targets do not depend on ranks and stage.
    """
    for layout in layouts(PROGRAMS.keys() - VARIANTS):
        if layout.ranks == 1 or layout.stage == 3:
            yield [Case(layout, "damage", ("checkpoint", how, "all")) for how in DAMAGES]
        if layout.ranks == 1 and layout.stage == 0:
            for target in TARGETS[1:]:
                yield [Case(layout, "damage", (target, how, "all")) for how in DAMAGES]


def _every_file() -> Iterator[list[Case]]:
    """Every file that a resume verifies in every layout, without a start for each damage.

    Models, tokenised data and what is appended to do not depend on ranks and stage.
    """
    everywhere = layouts(PROGRAMS.keys() - VARIANTS)
    yield [Case(layout, "every-file", ("checkpoint",)) for layout in everywhere]
    for target in TARGETS[2:]:
        first = [layout for layout in everywhere if (layout.ranks, layout.stage) == (1, 0)]
        yield [Case(layout, "every-file", (target,)) for layout in first]


def long_form() -> list[Case]:
    """All cases of `make faults`, mixed evenly: whatever is cut short has tried its share."""
    everywhere, variants = layouts(PROGRAMS.keys() - VARIANTS), layouts(VARIANTS)
    two_ranks = [layout for layout in everywhere if layout.ranks == 2]
    groups = [_spread("kill", 8 * len(everywhere), of=everywhere)]
    groups += [_spread("kill", 2 * len(variants), of=variants)]
    for name, count in zip(ERRORS, (48, 24, 12, 12), strict=True):
        groups += [_spread("error", count, name, of=everywhere)]
    groups += [_spread("signal", len(everywhere), name, of=everywhere) for name in SIGNALS]
    groups += [_spread("signal-one", len(two_ranks), "SIGTERM", of=two_ranks)]
    groups += [_spread("lost-rank", len(two_ranks), of=two_ranks), *_damage(), *_every_file()]
    placed = [
        ((place + 0.5) / len(group), number, case)
        for number, group in enumerate(groups)
        for place, case in enumerate(group)
    ]
    return [case for *_, case in sorted(placed, key=lambda entry: entry[:2])]


def middle_form() -> list[Case]:
    """Cases of the slow tests: some of each kind, in seconds."""
    checkpoint = "out/checkpoints/step-000006"
    names = [
        *("sft-z0-r1 kill 1", "sft-over-z0-r1 kill 1", "sft-z2-r2 kill 1"),
        *("sft-z0-r1 signal SIGTERM 1", "sft-z2-r2 signal SIGUSR1 1"),
        f"sft-z0-r1 damage checkpoint middle {checkpoint}/model/mp_rank_00_model_states.pt",
        f"sft-z0-r1 damage checkpoint truncate {checkpoint}/random-rank-0000.pt",
        f"sft-z0-r1 damage only-checkpoint end {checkpoint}/state.json",
        *(f"sft-z0-r1 every-file {target}" for target in ("checkpoint", *TARGETS[2:])),
    ]
    return [Case.named(name) for name in names]
