"""Warnings about a PPO run that goes wrong: the first cause, with its numbers and a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dschat.rlhf.ppo_history import WATCHED, History
from dschat.rlhf.ppo_rules import RULES, RunFacts
from dschat.train.finite import check_finite

REPEATED_AFTER = 50  # iterations between two warnings of one kind


def check_figures(figures: Mapping[str, float], iteration: int) -> None:
    """Stop a run one of whose figures is not finite; before weights or files change by it.

    Raises:
        UserError: naming the figure.
    """
    for name, value in figures.items():
        check_finite(value, f"{name} of iteration {iteration}")


def likely_causes(history: History, facts: RunFacts) -> dict[str, str]:
    """Diagnose the last iterations: warnings by the names of their rules."""
    warnings = {rule.name: rule.warning(history, facts) for rule in RULES}
    return {name: text for name, text in warnings.items() if text is not None}


class HealthMonitor:
    """Keeps the history of a run, and says what went wrong first.

    What follows from a cause that is seen, or was said, is not said; a warning comes again after
    `REPEATED_AFTER` iterations at the earliest.
    """

    per_rank = False  # statistics are those of all ranks

    def __init__(
        self, facts: RunFacts | None = None, slow_start: float = 0.0, updates: int = 1
    ) -> None:
        self.facts, self.history = facts or RunFacts(), History(slow_start, updates=updates)
        self.said: dict[str, int] = {}  # rule -> iteration

    def state_dict(self) -> dict[str, Any]:
        """State: the history, and the iteration of each warning."""
        return {"history": vars(self.history), "said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history and the iterations of warnings."""
        self.history, self.said = History(**state["history"]), dict(state["said"])

    def observe(self, iteration: int, statistics: Mapping[str, float]) -> list[str]:
        """Add an iteration's statistics; return the warnings that are due.

        Raises:
            UserError: a figure is not finite.
        """
        figures = {name: float(statistics[name]) for name in WATCHED if name in statistics}
        check_figures(figures, iteration)
        self.history.add(figures)
        seen = likely_causes(self.history, self.facts)
        lately = {n for n, at in self.said.items() if iteration - at < REPEATED_AFTER}
        known = seen.keys() | lately
        effects = {effect for rule in RULES if rule.name in known for effect in rule.explains}
        due = [name for name in seen if name not in effects | lately]
        self.said |= dict.fromkeys(due, iteration)
        return [seen[name] for name in due]
