"""Which figures stand together in one curve, in the order of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dschat.report.records import Points, Records

MOST_LINES = 8  # of a panel


@dataclass(frozen=True)
class Panel:
    """A curve to draw.

    Attributes:
        names: of figures; one that ends with `/` stands for all that begin so.
        log: the axis of the values is logarithmic.
        least: figures that make it worth a place.
    """

    title: str
    names: tuple[str, ...]
    log: bool = False
    least: int = 1

    @property
    def file(self) -> str:
        """The name of its picture without a suffix."""
        return re.sub("[^a-z0-9]+", "_", self.title.lower())

    def lines(self, records: Records) -> Iterator[tuple[str, Points, Points]]:
        """Yield each figure that the run has: name, points of training, held-out points."""
        for name in self.names:
            every = [n for n in sorted(records.names) if n == name or _below(n, name)]
            for found in every[:MOST_LINES]:
                yield found, records.train.get(found, []), records.held_out.get(found, [])


def finite(points: Points) -> int:
    """Count the points that can be drawn."""
    return sum(math.isfinite(value) for _, value in points)


def _below(name: str, prefix: str) -> bool:
    return prefix.endswith("/") and name.startswith(prefix)


PANELS = (
    Panel("Loss", ("loss",)),
    Panel("Perplexity", ("perplexity",)),
    Panel("Accuracy", ("accuracy", "confidence")),
    Panel("Margin", ("margin",)),
    Panel("Log-probabilities", ("chosen_logprobs", "rejected_logprobs")),
    Panel("Reward", ("reward", "rewards/")),
    # One part alone is the reward again.
    Panel("Parts of the reward", ("reward_model", "reward_function"), least=2),
    Panel("KL to the reference, nats a token", ("kl_per_token",)),
    Panel("Nats a token under the reference", ("ref_nats_per_token",)),
    Panel("Answer length, tokens", ("answer_length",)),
    Panel("Share of answers that end", ("ended",)),
    Panel("Entropy, nats", ("entropy",)),
    Panel("Clipped share", ("clip_fraction", "value_clip_fraction")),
    Panel("Critic: explained variance", ("explained_variance",)),
    Panel("Critic loss", ("critic_loss",)),
    Panel("Gradient norm", ("grad_norm", "actor_grad_norm", "critic_grad_norm"), log=True),
    Panel("Learning rates", ("lr/",), log=True),
    Panel("Seconds of an iteration", ("seconds/",)),
    Panel("Tokens a second", ("tokens_per_s", "answer_tokens_per_s")),
)


def drawn(records: Records) -> list[Panel]:
    """Choose the panels of which the run has a figure, or their `least`, at two steps."""
    return [
        panel
        for panel in PANELS
        if sum(finite(train) > 1 or finite(held) > 1 for _, train, held in panel.lines(records))
        >= panel.least
    ]
