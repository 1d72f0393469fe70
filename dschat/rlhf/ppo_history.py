"""Figures of a PPO run from iteration to iteration, and what can be seen in them.

The last iterations are compared with the first one, in which the policy is the reference. Numbers
that separate good from bad are calibrated on real runs by `benchmarks/ppo_monitor.py`.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean

WATCHED = (
    *("reward", "reward_std", "reward_clipped", "answers", "answer_length", "ended"),
    *("kl_per_token", "kl_k3", "ref_nats_per_token", "decode_gap", "frac_reward_zero_std"),
    *("entropy", "clip_fraction", "explained_variance", "unscored", "masked"),
)
REMEMBERED = 10  # iterations
SHORT, LONG = 2, 3  # iterations that show a state: one that is plain, one that could be chance
ANSWERS = 64.0  # of an iteration, where the figures do not tell

NO_SPREAD = 1e-6  # relative
NEGATIVE_KL = 0.01  # nats a token
FAR, FAR_ANSWER = 0.5, 5.0  # nats a token from the reference; a few words may cost more, not many
JUMP = 2.0  # nats a token, in one iteration
NEAR, PACE = 0.25, 0.08  # nats a token; by how much they grow in an iteration on the way to `FAR`
MOVED = 0.5  # of the first iteration's spread of rewards
CERTAIN = 4.0  # standard errors
FEW_ENDS, LONGER = 0.5, 1.2  # times the first share and length
ANOTHER_LENGTH, LENGTH_SPREAD = 0.25, 0.5  # of the first length; an answer's standard deviation
LIKELY = 3.0  # standard errors of what also goes one way in each of `LONG` iterations
FEWER_ENDS = 0.1  # of the answers
COLLAPSED = 0.1  # times the first entropy
STILL, STILL_AFTER = 1e-4, 20  # nats a token after so many iterations; KL grows with their square


@dataclass
class History:
    """Watched figures: the first of each kind, those of the last iterations, and their number.

    An iteration lacks the figures of what it does not do (no critic: no explained variance; no
    step of the actor: no entropy). A figure that is not known is nan, which is beyond no limit.

    Attributes:
        slow_start: iterations before the actor trains at its full rate.
        best: largest mean of the reward over `LONG` iterations; absent before there is one.
    """

    slow_start: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    recent: list[dict[str, float]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        """Take in an iteration."""
        for name, value in figures.items():
            self.first.setdefault(name, value)
            self.seen[name] = self.seen.get(name, 0) + 1
        self.recent = [*self.recent, figures][-REMEMBERED:]
        if not math.isnan(reward := self.mean("reward", LONG)):
            self.best["reward"] = max(self.best.get("reward", reward), reward)

    def last(self, name: str, count: int) -> list[float]:
        """Figure in the last `count` iterations; empty where one of them lacks it."""
        values = [figures[name] for figures in self.recent[-count:] if name in figures]
        return values if len(values) == count else []

    def stays(
        self, name: str, count: int = SHORT, *, above: float = -math.inf, below: float = math.inf
    ) -> bool:
        """Tell whether a figure has been within these limits in each of the last iterations."""
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

    @property
    def reward_rise(self) -> float:
        """Rise of the reward since the first iteration, in its spreads there."""
        spread = self.first.get("reward_std", 0.0)
        return (self.mean("reward", LONG) - self.first["reward"]) / spread if spread else math.nan

    def grows(self, name: str, by: float = 0.0, sign: int = 1) -> bool:
        """Tell whether a figure has grown, or with sign -1 fallen, by more in each of the last."""
        values = self.last(name, LONG + 1)
        steps = [sign * (later - before) for before, later in itertools.pairwise(values)]
        return bool(steps) and min(steps) > by

    def gains(self, spreads: float) -> bool:
        """Tell whether the reward is above its start by so many spreads, on average or by now."""
        spread, latest = self.first.get("reward_std", 0.0), self.mean("reward", 1)
        rise = (latest - self.first["reward"]) / spread if spread else math.nan
        return self.reward_rise > spreads or rise > spreads

    @property
    def chance(self) -> float:
        """Difference of two means of the reward that chance makes no larger, in spreads."""
        return CERTAIN * math.sqrt((1 + 1 / LONG) / self.first.get("answers", ANSWERS))

    @property
    def fell(self) -> bool:
        """Tell whether the reward is below its start, by more than chance does."""
        return self.reward_rise < -max(MOVED, self.chance)

    @property
    def is_at_its_best(self) -> bool:
        """Tell whether the reward has risen, and is not below what it has been."""
        spread = self.first.get("reward_std", 0.0)
        if not spread or not self.gains(MOVED):
            return False
        loss = (self.best.get("reward", math.inf) - self.mean("reward", LONG)) / spread
        return loss < max(MOVED / 2, self.chance)

    @property
    def collapses(self) -> bool:
        """Tell whether the policy says one and the same, and not because it is what is right."""
        return self.change("entropy") < COLLAPSED and not self.is_at_its_best

    @property
    def is_far(self) -> bool:
        """Tell whether the policy is far from the reference, twice or after steady steps."""
        far = [self._is_beyond(FAR, figures) for figures in self.recent[-SHORT:]]
        return far[-1:] == [True] and (far == SHORT * [True] or self.grows("kl_per_token", PACE))

    @staticmethod
    def _is_beyond(nats: float, figures: dict[str, float]) -> bool:
        kl, tokens = figures.get("kl_per_token", 0.0), figures.get("answer_length", 0.0)
        return kl > nats and kl * tokens > FAR_ANSWER

    @property
    def ran_away(self) -> bool:
        """Tell whether the policy got far at once, or without a gain, or is on its way there."""
        nats = [figures.get("kl_per_token", 0.0) for figures in self.recent]
        steps = [later - before for before, later in itertools.pairwise(nats)]
        if self.is_far and (max(steps, default=0.0) > JUMP or not self.gains(MOVED)):
            return True
        leaves = self._is_beyond(NEAR, self.recent[-1]) and self.grows("kl_per_token", PACE)
        return leaves and not self.gains(MOVED / 2)

    @property
    def is_gamed(self) -> bool:
        """Tell whether the reward rose while the policy left the reference."""
        unlikely = self.mean("ref_nats_per_token", LONG) - self.first.get("ref_nats_per_token", 0.0)
        return self.gains(MOVED) and (self.is_far or unlikely > FAR)

    @property
    def has_negative_kl(self) -> bool:
        """Tell whether KL is negative by more than chance: k1's variance is about twice the KL."""
        tokens = LONG * self.first.get("answers", ANSWERS) * self.mean("answer_length", LONG)
        variance = 2 * max(self.mean("kl_k3", LONG), 0.0) / tokens
        chance = CERTAIN * math.sqrt(variance) if variance > 0 else 0.0
        limit = -max(NEGATIVE_KL, chance)
        return self.stays("kl_per_token", LONG, below=0) and self.mean("kl_per_token", LONG) < limit

    @property
    def has_equal_rewards(self) -> bool:
        """Tell whether all answers are worth the same."""
        spreads, rewards = self.last("reward_std", SHORT), self.last("reward", SHORT)
        pairs = list(zip(spreads, rewards, strict=False))
        return bool(pairs) and all(s <= NO_SPREAD * max(abs(r), 1.0) for s, r in pairs)

    @property
    def loses_ends(self) -> bool:
        """Tell whether answers grow and many end no more."""
        few = self.first.get("ended", 0.0) > 1 - FEW_ENDS and self.change("ended") < FEW_ENDS
        return few and self.change("answer_length") > LONGER

    def is_on_the_way(self, sign: int) -> bool:
        """Tell whether answers now shrink (-1) or grow (1) steadily, by more than chance does."""
        first = self.first.get("answer_length", 0.0)
        chance = LIKELY * LENGTH_SPREAD * math.sqrt(2 / self.first.get("answers", ANSWERS))
        lengths = self.last("answer_length", LONG + 1) or [0.0]
        moved = sign * (lengths[-1] - lengths[0])
        least = max(ANOTHER_LENGTH, chance) * max(first, lengths[0])
        return self.grows("answer_length", sign=sign) and moved > least

    @property
    def shrinks(self) -> bool:
        """Tell whether answers get ever shorter, and not because more of them end."""
        first = self.first.get("ended", 0.0)
        more = self.mean("ended", 1) > first + FEWER_ENDS * (1 - first)
        return self.is_on_the_way(-1) and not more

    @property
    def runs_on(self) -> bool:
        """Tell whether answers get ever longer, and fewer of them end."""
        first, count = self.first.get("ended", 0.0), self.first.get("answers", ANSWERS)
        chance = 2 * math.sqrt(2 * first * (1 - first) / count)
        fewer = first - self.mean("ended", 1)
        return self.is_on_the_way(1) and fewer > max(FEWER_ENDS, chance)

    @property
    def stands_still(self) -> bool:
        """Tell whether the actor trains without effect; of KL's estimators k3 has no noise then."""
        trained = max(self.seen.get("entropy", 0) - 1 - self.slow_start, 0.0)
        limit = STILL * min(trained / STILL_AFTER, 1.0) ** 2
        nats = self.mean("kl_k3" if "kl_k3" in self.first else "kl_per_token")
        return trained >= LONG and abs(nats) < limit and not abs(self.reward_rise) > MOVED

    def words(self) -> dict[str, float]:
        """Figures of a message: NAME, the mean of the last iterations, and first_NAME."""
        words: dict[str, float] = defaultdict(lambda: math.nan)
        for name, value in self.first.items():
            words[name], words[f"first_{name}"] = self.mean(name), value
        return words
