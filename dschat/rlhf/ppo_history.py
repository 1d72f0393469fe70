"""Symptoms of trouble in the history of a PPO run.

The last iterations are compared with the first one, in which the policy is the reference. Numbers
that separate good from bad are calibrated on real runs by `benchmarks/ppo_monitor.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from dschat.rlhf.ppo_series import ANSWERS, LONG, REMEMBERED, SHORT, Series

WATCHED = (
    *("reward", "reward_error", "reward_std", "reward_clipped", "answers"),
    *("answer_length", "answer_length_error", "ended"),
    *("kl_per_token", "kl_k3", "ref_nats_per_token", "decode_gap", "frac_reward_zero_std"),
    *("entropy", "clip_fraction", "explained_variance", "unscored", "masked"),
    "actor_skipped_steps",
)

NO_SPREAD = 1e-6  # relative
NEGATIVE_KL = 0.01  # nats a token
FAR, FAR_ANSWER = 0.5, 5.0  # nats a token from the reference; a few words may cost more, not many
JUMP = 1.0  # nats a token, in one iteration
NEAR, PACE = 0.25, 0.08  # nats a token; by how much they grow in an iteration on the way to `FAR`
MOVED = 0.5  # of the first iteration's spread of rewards
CERTAIN = 4.0  # standard errors
FALLEN = 0.2  # of the first iteration's spread of rewards, by a steady fall
EARNED, SOME = 0.1, 0.25  # of the gain that a KL can buy at most; spreads, up to `MOVED`
FEW_ENDS, LONGER = 0.5, 1.2  # times the first share and length
SHORTENED, LENGTHENED = 0.22, 0.3  # of the first length, on the way
ONE_STEP = 0.75  # of the whole way: what got there in one step is not on the way
FEWER_ENDS = 0.08  # of the answers
LIKELY = 1.5  # standard errors of what is seen beside something certain
COLLAPSED = 0.1  # times the first entropy
SAW = 0.1  # explained variance of a critic that has learned
SEES_NOTHING = 0.01  # of one that predicts the same for all, but for rounding
STILL, STILL_AFTER = 1e-4, 20  # nats a token after so many iterations; KL grows with their square


@dataclass
class History(Series):
    """Figures of a run, and what can be seen in them."""

    @property
    def reward_rise(self) -> float:
        """Rise of the reward since the first iteration, in its spreads there."""
        spread = self.first.get("reward_std", 0.0)
        return (self.mean("reward", LONG) - self.first["reward"]) / spread if spread else math.nan

    def gains(self, spreads: float) -> bool:
        """Return whether the reward is above its start by so many spreads, on average or by now."""
        spread, latest = self.first.get("reward_std", 0.0), self.mean("reward", 1)
        rise = (latest - self.first["reward"]) / spread if spread else math.nan
        return self.reward_rise > spreads or rise > spreads

    @property
    def chance(self) -> float:
        """Difference of the first reward and a mean of `LONG` that chance makes no larger."""
        noise, spread = self.noise("reward"), self.first.get("reward_std", 0.0)
        return CERTAIN * math.sqrt(1 + 1 / LONG) * noise / spread if spread else math.inf

    @property
    def fell(self) -> bool:
        """Return whether the reward is below its start, or steadily gets there, beyond chance."""
        if self.is_near:  # the same policy's rewards
            return False
        if self.reward_rise < -max(MOVED, self.chance):
            return True
        chance = LIKELY * math.sqrt(2) * self.noise("reward")
        least = FALLEN * self.first.get("reward_std", 0.0)
        if not self.mean("reward", 1) < self.first.get("reward", math.nan) - max(least, chance):
            return False
        trends = [self.trend("reward", count) for count in range(LONG + 1, REMEMBERED + 1)]
        return any(t.certainty < -CERTAIN and t.moved < -least for t in trends)

    @property
    def is_at_its_best(self) -> bool:
        """Return whether the reward has risen, and is not below what it has been."""
        spread = self.first.get("reward_std", 0.0)
        if not spread or not self.gains(MOVED):
            return False
        loss = (self.best.get("reward", math.inf) - self.mean("reward", LONG)) / spread
        return loss < max(MOVED / 2, self.chance)

    @property
    def collapses(self) -> bool:
        """Return whether the policy says one and the same, and not because it is what is right."""
        return self.change("entropy") < COLLAPSED and not self.is_at_its_best

    @property
    def is_far(self) -> bool:
        """Return whether the policy is far from the reference, twice or after steady steps."""
        far = [self._is_beyond(FAR, figures) for figures in self.recent[-SHORT:]]
        return far[-1:] == [True] and (far == SHORT * [True] or self.grows("kl_per_token", PACE))

    @staticmethod
    def _is_beyond(nats: float, figures: dict[str, float]) -> bool:
        kl, tokens = figures.get("kl_per_token", 0.0), figures.get("answer_length", 0.0)
        return kl > nats and kl * tokens > FAR_ANSWER

    @property
    def ran_away(self) -> bool:
        """Return whether the policy got far at once, or without a gain, or is on its way there."""
        nats = [figures.get("kl_per_token", 0.0) for figures in self.recent]
        steps = [later - before for before, later in itertools.pairwise(nats)]
        if self._is_beyond(FAR, self.recent[-1]) and max(steps, default=0.0) > JUMP:
            return True
        if self.is_far and not self.gains(MOVED):
            return True
        if not self._is_beyond(NEAR, self.recent[-1]) or not self.grows("kl_per_token"):
            return False
        last = self.last("kl_per_token", LONG + 1)
        return last[-1] - last[0] > LONG * PACE and not self.gains(self._worth)

    @property
    def _worth(self) -> float:
        """Least gain of the reward, in spreads, that the present KL should have bought.

        Of Gaussian rewards K nats an answer buy sqrt(2 K) spreads at most.
        """
        nats = self.mean("kl_per_token", 1) * self.mean("answer_length", 1)
        return min(max(EARNED * math.sqrt(2 * nats), SOME), MOVED)

    @property
    def is_gamed(self) -> bool:
        """Return whether the reward rose while the policy left the reference."""
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
        """Return whether all answers are worth the same."""
        spreads, rewards = self.last("reward_std", SHORT), self.last("reward", SHORT)
        pairs = list(zip(spreads, rewards, strict=False))
        return bool(pairs) and all(s <= NO_SPREAD * max(abs(r), 1.0) for s, r in pairs)

    @property
    def loses_ends(self) -> bool:
        """Return whether answers grow and many end no more."""
        few = self.first.get("ended", 0.0) > 1 - FEW_ENDS and self.change("ended") < FEW_ENDS
        return few and self.change("answer_length") > LONGER

    def is_on_the_way(self, sign: int, least: float) -> bool:
        """Return whether answers shrink (-1) or grow (1) steadily, beyond chance.

        Args:
            least: of the first length, or of that of `LONG` iterations ago.
        """
        lengths = self.last("answer_length", LONG + 1)
        if not lengths:
            return False
        trend = self.trend("answer_length", LONG + 1)
        least *= max(self.first.get("answer_length", 0.0), lengths[0])
        steps = [sign * (later - before) for before, later in itertools.pairwise(lengths)]
        steady = -self.noise("answer_length") < min(steps) <= max(steps) < ONE_STEP * sum(steps)
        return steady and sign * trend.moved > least and sign * trend.certainty > CERTAIN

    @property
    def shrinks(self) -> bool:
        """Return whether answers get ever shorter, and not because more of them end.

        One that ends now and was cut, at about twice the mean length, takes that much off.
        """
        first = self.first.get("answer_length", 0.0)
        shorter = 1 - self.mean("answer_length", 1) / first if first else math.nan
        more = self.mean("ended", 1) - self.first.get("ended", 0.0) + self._end_error
        return self.is_on_the_way(-1, SHORTENED) and not 2 * more > shorter

    @property
    def runs_on(self) -> bool:
        """Return whether answers get ever longer, and fewer of them end."""
        fewer = self.first.get("ended", 0.0) - self.mean("ended", 1)
        return self.is_on_the_way(1, LENGTHENED) and fewer > max(
            FEWER_ENDS, LIKELY * self._end_error
        )

    @property
    def _end_error(self) -> float:
        """Standard error of the difference of two shares of answers that end."""
        share, count = self.first.get("ended", 0.0), self.first.get("answers", ANSWERS)
        return math.sqrt(2 * share * (1 - share) / count)

    @property
    def is_critic_blind(self) -> bool:
        """Return whether the critic predicts no better than a constant.

        One that never did may be learning still: good runs begin so.
        """
        if self.best.get("explained_variance", -math.inf) > SAW:
            return self.stays("explained_variance", LONG, below=0)
        return self.stays("explained_variance", REMEMBERED, below=SEES_NOTHING)

    @property
    def trained(self) -> float:
        """Iterations at its full rate that the actor's steps so far come to; 0 below `SHORT`.

        Of W steps in which the rate rises, step k = 0, 1, … has k/W of it. What fp16 skips moves
        nothing.
        """
        before = self.seen.get("entropy", 0) - 1  # figures are those before an iteration's steps
        steps = before * self.updates - self.recent[-1].get("actor_skipped_steps", 0.0)
        if before < SHORT or steps < 0:
            return 0.0
        rising = self.slow_start * self.updates
        risen = min(steps, rising)
        slow = risen * max(risen - 1, 0.0) / (2 * rising) if rising else 0.0
        return (steps - risen + slow) / self.updates

    @property
    def is_near(self) -> bool:
        """Tell whether the steps moved next to nothing; of KL's estimators k3 has no noise then."""
        limit = STILL * min(self.trained / STILL_AFTER, 1.0) ** 2
        nats = "kl_k3" if "kl_k3" in self.first else "kl_per_token"
        return self.stays(nats, above=-limit, below=limit)

    @property
    def stands_still(self) -> bool:
        """Tell whether the actor trains without effect."""
        return self.is_near and not abs(self.reward_rise) > max(MOVED, self.chance)
