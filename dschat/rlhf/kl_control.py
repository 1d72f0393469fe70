"""The coefficient of the KL penalty: fixed, or steered towards a target."""

from __future__ import annotations

LARGEST_ERROR = 0.2  # of the target; what goes beyond it counts as this much


class KLController:
    """Proportional control of log beta (Ziegler et al. 2019, arXiv:1909.08593).

    error = clip(KL / target - 1, -0.2, 0.2),  beta <- beta * (1 + error * answers / horizon)

    The paper's gain of 0.1 an iteration is a horizon of ten iterations' answers.

    Args:
        coefficient: beta of the first iteration.
        target: nats an answer; None keeps beta.
        horizon: answers over which an error acts in full; more of them in one iteration count as
            one horizon, so that beta stays above 0.
    """

    def __init__(self, coefficient: float, target: float | None = None, horizon: int = 10_000):
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, answers: float) -> None:
        """After an iteration.

        Args:
            kl: mean over its answers, on all ranks, of log(policy / reference), nats.
            answers: how many they were.
        """
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        self.coefficient *= 1.0 + error * min(answers / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """The present coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.coefficient = state["coefficient"]
