"""The critic's pass over fresh answers, kept for its step on them instead of made a second time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dschat.lazy import torch

if TYPE_CHECKING:
    from dschat.train.engine import Engine


@dataclass(frozen=True)
class KeptPass:
    """Values with their graph; the graph serves one backward pass, by the weights that made it.

    Attributes:
        values: (B, A), alone in a list that all selections of rows share; [] once they are taken.
        critic, steps: whose values they are, and the number of its steps before them.
        index: rows that are wanted, in their order; None: all.
    """

    values: list[torch.Tensor]
    critic: Engine
    steps: int
    index: torch.Tensor | None = None

    @classmethod
    def of(cls, critic: Engine, values: torch.Tensor) -> KeptPass:
        """Keep a pass that the present weights have just made."""
        return cls([values], critic, critic.global_steps)

    def rows(self, index: torch.Tensor) -> KeptPass:
        """Select rows of these."""
        return replace(self, index=index if self.index is None else self.index[index])

    def taken(self, critic: Engine) -> torch.Tensor | None:
        """Return the rows' values, once; None where a new pass has to be made."""
        if not self.values or critic is not self.critic or critic.global_steps != self.steps:
            return None
        values = self.values.pop()
        return values if self.index is None else values[self.index]
