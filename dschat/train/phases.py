"""Where the time of a run goes, and which part of it raises the peak of memory.

Whoever ends a part calls `mark`; what has passed since the last mark was that part. On a GPU, which
works on while the host goes ahead, a part ends where the host waits: at the end of each step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from dschat.train import memory_use
from dschat.utils.bounded import peak_resident

GIB = 2**30
START, ROLLOUTS, TRAINING = "start", "rollouts and scoring", "training"
EVALUATION, CHECKPOINTS, SAVING = "evaluation", "checkpoints", "saving the model"


@dataclass
class Phase:
    """A part of the run so far.

    Attributes:
        seconds: in sum. peak_gib: what it raised the peak of memory to, on the GPU where there is
            one, else of the process; 0: it raised none.
    """

    seconds: float = 0.0
    peak_gib: float = 0.0


class Phases:
    """The parts of one run, in the order in which they first came."""

    def __init__(self) -> None:
        self.parts: dict[str, Phase] = {}
        self._marked, self._peak = time.perf_counter(), 0

    def mark(self, name: str) -> None:
        """Count what has passed since the last mark as a part of that name."""
        part, now, peak = self.parts.setdefault(name, Phase()), time.perf_counter(), peak_bytes()
        part.seconds += now - self._marked
        if peak > self._peak:
            part.peak_gib, self._peak = peak / GIB, peak
        self._marked = now

    def table(self) -> dict[str, dict[str, float]]:
        """Seconds and peaks by name, as JSON takes them."""
        return {
            name: {"seconds": round(part.seconds, 1), "peak_gib": round(part.peak_gib, 2)}
            for name, part in self.parts.items()
        }


def peak_bytes() -> int:
    """Most bytes so far: of tensors on the GPU, or without one of the process."""
    return memory_use.peak() or peak_resident()


_now = Phases()


def begin() -> None:
    """Begin to count, for a run that begins."""
    global _now
    _now = Phases()


def mark(name: str) -> None:
    """Count what has passed since the last mark of this process's run."""
    _now.mark(name)


def table() -> dict[str, dict[str, float]]:
    """Seconds and peaks of this process's run."""
    return _now.table()
