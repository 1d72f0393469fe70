"""Figures of a PPO run from iteration to iteration: means, noise and trends of the last of them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, median

REMEMBERED = 10  # iterations
SHORT, LONG = 2, 3  # iterations that show a state: one that is plain, one that could be chance
ANSWERS = 64.0  # of an iteration, where the figures do not tell
LENGTH_SPREAD = 0.5  # of the length: an answer's standard deviation, where the figures do not tell
SCATTERED = 2.5  # 1 + this over the root of their number: medians of bends are no larger by chance
BEND = 0.6745 * math.sqrt(6)  # median of |x - 2 y + z|, of independent ones with deviation 1


@dataclass(frozen=True)
class Trend:
    """A line through a figure of some iterations.

    Attributes:
        moved: from the first to the last of them. certainty: slope in standard errors.
        end: its value at the last.
    """

    moved: float
    certainty: float
    end: float


@dataclass
class Series:
    """Watched figures: the first of each kind, those of the last iterations, and their number.

    An iteration lacks the figures of what it does not do (no critic: no explained variance; no
    step of the actor: no entropy). A figure that is not known is nan, which is beyond no limit.

    Attributes:
        slow_start: iterations in which the actor's rate rises, the first of its steps at 0.
        updates: steps of an iteration.
        best: largest mean of reward and explained variance over `LONG` iterations; absent before
            there is one.
    """

    slow_start: float = 0.0
    updates: int = 1
    first: dict[str, float] = field(default_factory=dict)
    recent: list[dict[str, float]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        """Add an iteration."""
        for name, value in figures.items():
            self.first.setdefault(name, value)
            self.seen[name] = self.seen.get(name, 0) + 1
        self.recent = [*self.recent, figures][-REMEMBERED:]
        for name in ("reward", "explained_variance"):
            if not math.isnan(mean := self.mean(name, LONG)):
                self.best[name] = max(self.best.get(name, mean), mean)

    def last(self, name: str, count: int) -> list[float]:
        """Figure in the last `count` iterations; empty where one of them lacks it."""
        values = [figures[name] for figures in self.recent[-count:] if name in figures]
        return values if len(values) == count else []

    def stays(
        self, name: str, count: int = SHORT, *, above: float = -math.inf, below: float = math.inf
    ) -> bool:
        """Return whether a figure has been within these limits in each of the last iterations."""
        values = self.last(name, count)
        return bool(values) and all(above < value < below for value in values)

    def mean(self, name: str, count: int = SHORT) -> float:
        """Mean over the last iterations."""
        values = self.last(name, count)
        return fmean(values) if values else math.nan

    def change(self, name: str) -> float:
        """Mean of the last iterations in terms of the first."""
        first = self.first.get(name, 0.0)
        return self.mean(name) / first if first else math.nan

    def grows(self, name: str, by: float = 0.0, sign: int = 1) -> bool:
        """Tell whether a figure has grown, or with sign -1 fallen, by more in each of the last."""
        values = self.last(name, LONG + 1)
        steps = [sign * (later - before) for before, later in itertools.pairwise(values)]
        return bool(steps) and min(steps) > by

    def noise(self, name: str) -> float:
        """Standard error of a mean over an iteration's answers, as the last iterations show it.

        Where iterations scatter about a steady course by more than their answers tell, as those
        whose prompts are grouped by length do, by that.
        """
        figures = self.recent[-1]
        spread = LENGTH_SPREAD * self.first.get(name, 0.0)
        spread = figures.get("reward_std", 0.0) if name == "reward" else spread
        assumed = spread / math.sqrt(figures.get("answers", ANSWERS))
        error = fmean(f.get(f"{name}_error", assumed) for f in self.recent)
        values = [f[name] for f in self.recent if name in f]
        steps = [later - before for before, later in itertools.pairwise(values)]
        bends = [abs(later - before) for before, later in itertools.pairwise(steps)]
        scatter = median(bends) / BEND if len(bends) >= LONG else 0.0
        by_chance = 1 + SCATTERED / math.sqrt(max(len(bends), 1))
        return scatter if scatter > by_chance * error else error

    def trend(self, name: str, count: int) -> Trend:
        """Fit a line to the last `count` iterations; flat where one of them lacks the figure."""
        values = self.last(name, count)
        if not values:
            return Trend(0.0, 0.0, 0.0)
        places = [place - (count - 1) / 2 for place in range(count)]
        squares = sum(place * place for place in places)
        slope = sum(p * value for p, value in zip(places, values, strict=True)) / squares
        error, half = self.noise(name) / math.sqrt(squares), (count - 1) / 2
        certainty = slope / error if error else math.copysign(math.inf, slope) if slope else 0.0
        return Trend(2 * half * slope, certainty, fmean(values) + half * slope)

    def words(self) -> dict[str, float]:
        """Figures of a message: NAME, the mean of the last iterations, and first_NAME."""
        words: dict[str, float] = defaultdict(lambda: math.nan)
        for name, value in self.first.items():
            words[name], words[f"first_{name}"] = self.mean(name), value
        return words
