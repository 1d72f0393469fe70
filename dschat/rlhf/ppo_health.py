"""Warnings about a PPO run that goes wrong, each with its numbers, its likely cause, a remedy.

A rule looks at the figures of the first iterations and of the last ones, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

FIRST = 5  # iterations that say where the run started
SHORT, LONG = 5, 10  # iterations of a state that lasts
REPEATED_AFTER = 50  # iterations between two warnings of one kind
WATCHED = (
    *("reward", "reward_std", "reward_clipped", "kl_per_token", "ref_nats_per_token", "ended"),
    *("answer_length", "clip_fraction", "explained_variance", "entropy"),
)

NEGATIVE_KL = -0.01  # nats per token, more than the noise of an estimate around 0
NATS_RISE = 0.5  # per token, of the samples under the reference
REWARD_RISE = 0.25  # in spreads of the reward
NO_ENDS = 0.01
HIGH_CLIP_FRACTION = 0.3
MANY_CLIPPED = 0.5
NO_SPREAD = 1e-6  # relative
LOW_ENTROPY = 0.1  # of what it was


@dataclass(frozen=True)
class History:
    """Watched figures: the first of each kind, and those of the last `LONG` iterations, in order.

    An iteration lacks the figures of what it does not do (no critic: no explained variance; no
    step of the actor: no entropy).
    """

    first: Mapping[str, Sequence[float]]
    recent: Sequence[Mapping[str, float]]

    def last(self, name: str, count: int) -> list[float] | None:
        """Figure in the last `count` iterations; None where there are fewer."""
        values = [figures[name] for figures in self.recent[-count:] if name in figures]
        return values if len(values) == count else None

    def at_first(self, name: str) -> float | None:
        """Mean over the first iterations that have it; None before they are over."""
        values = self.first.get(name, ())
        return fmean(values) if len(values) == FIRST else None


def likely_causes(history: History) -> dict[str, str]:
    """Diagnose the last iterations: warnings by kind; empty for a healthy run."""
    warnings = {name: rule(history) for name, rule in RULES.items()}
    return {name: text for name, text in warnings.items() if text is not None}


def _negative_kl(history: History) -> str | None:
    values = history.last("kl_per_token", LONG)
    if values is None or max(values) >= 0 or fmean(values) > NEGATIVE_KL:
        return None
    return (
        f"KL to the reference has been negative for {LONG} iterations (mean {fmean(values):.3f} "
        "nats per token): answers are not drawn from the policy that is scored; use "
        "temperature 1, top_p 1 and top_k 0, and look for dropout that is left on"
    )


def _over_optimisation(history: History) -> str | None:
    reward, nats = history.last("reward", SHORT), history.last("ref_nats_per_token", SHORT)
    spread, nats_before = history.last("reward_std", SHORT), history.at_first("ref_nats_per_token")
    before = history.at_first("reward")
    if reward is None or nats is None or spread is None or nats_before is None or before is None:
        return None
    rise, nats_rise = fmean(reward) - before, fmean(nats) - nats_before
    if rise <= REWARD_RISE * fmean(spread) or nats_rise <= NATS_RISE:
        return None
    return (
        f"reward rose from {before:.3g} to {fmean(reward):.3g} while the reference finds the "
        f"answers ever less likely ({nats_before:.2f} to {fmean(nats):.2f} nats per token): the "
        "reward is being gamed; read the answers (print_answers), raise kl_coef or stop earlier"
    )


def _no_ends(history: History) -> str | None:
    values, lengths = history.last("ended", SHORT), history.last("answer_length", SHORT)
    if values is None or lengths is None or fmean(values) >= NO_ENDS:
        return None
    return (
        f"{fmean(values):.1%} of the answers of the last {SHORT} iterations ended (mean length "
        f"{fmean(lengths):.0f} tokens): raise max_answer_seq_len, give missing_eos_penalty, "
        "or check that step 1 trained with the same end token"
    )


def _high_clip_fraction(history: History) -> str | None:
    values = history.last("clip_fraction", SHORT)
    if values is None or fmean(values) <= HIGH_CLIP_FRACTION:
        return None
    return (
        f"{fmean(values):.0%} of the tokens were clipped in the last {SHORT} iterations: updates "
        "are too large; lower actor_learning_rate or ppo_epochs"
    )


def _blind_critic(history: History) -> str | None:
    values = history.last("explained_variance", LONG)
    if values is None or max(values) >= 0:
        return None
    return (
        f"explained variance has been below 0 for {LONG} iterations (mean {fmean(values):.2f}): "
        "the critic predicts worse than a constant; raise critic_learning_rate, or lower it "
        "where critic_loss does not fall"
    )


def _equal_rewards(history: History) -> str | None:
    spreads, rewards = history.last("reward_std", SHORT), history.last("reward", SHORT)
    if spreads is None or rewards is None:
        return None
    pairs = zip(spreads, rewards, strict=True)
    if any(spread > NO_SPREAD * max(abs(reward), 1.0) for spread, reward in pairs):
        return None
    return (
        f"all answers of the last {SHORT} iterations have the reward {rewards[-1]:.3g}: there is "
        "nothing to learn from; check reward_function, or the reward model by rw_eval.py"
    )


def _clipped_rewards(history: History) -> str | None:
    values = history.last("reward_clipped", SHORT)
    if values is None or fmean(values) <= MANY_CLIPPED:
        return None
    return (
        f"{fmean(values):.0%} of the rewards of the last {SHORT} iterations lie beyond "
        "reward_clip, which makes them equal: raise it, or give reward_scaling saved"
    )


def _entropy_collapse(history: History) -> str | None:
    values, before = history.last("entropy", SHORT), history.at_first("entropy")
    if values is None or before is None or fmean(values) >= LOW_ENTROPY * before:
        return None
    return (
        f"entropy fell from {before:.3g} to {fmean(values):.3g} nats per token: the policy says "
        "one and the same; raise kl_coef or lower actor_learning_rate"
    )


RULES: dict[str, Callable[[History], str | None]] = {
    "negative KL": _negative_kl,
    "over-optimisation": _over_optimisation,
    "no ends": _no_ends,
    "high clip fraction": _high_clip_fraction,
    "blind critic": _blind_critic,
    "equal rewards": _equal_rewards,
    "clipped rewards": _clipped_rewards,
    "entropy collapse": _entropy_collapse,
}


class HealthMonitor:
    """Keeps the history of a run; repeats a warning every `REPEATED_AFTER` iterations at most."""

    per_rank = False  # statistics are those of all ranks

    def __init__(self) -> None:
        self.first: dict[str, list[float]] = {}
        self.recent: list[dict[str, float]] = []
        self.said: dict[str, int] = {}  # kind of warning -> iteration

    def state_dict(self) -> dict[str, Any]:
        """State: the history, and the iteration of each warning."""
        return {"first": self.first, "recent": self.recent, "said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history and the iterations of warnings."""
        self.first = {name: list(values) for name, values in state["first"].items()}
        self.recent = list(state["recent"])
        self.said = dict(state["said"])

    def observe(self, iteration: int, statistics: Mapping[str, float]) -> list[str]:
        """Take in an iteration's statistics; return the warnings that are due."""
        figures = {name: float(statistics[name]) for name in WATCHED if name in statistics}
        for name, value in figures.items():
            values = self.first.setdefault(name, [])
            if len(values) < FIRST:
                values.append(value)
        self.recent = [*self.recent, figures][-LONG:]
        due = []
        for name, text in likely_causes(History(self.first, self.recent)).items():
            if iteration - self.said.get(name, -REPEATED_AFTER) >= REPEATED_AFTER:
                self.said[name] = iteration
                due.append(text)
        return due
