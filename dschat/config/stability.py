"""Flags of what keeps PPO's updates in bounds."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.functional.returns import KL_ESTIMATORS
from dschat.rlhf.ppo_config import WHITENING
from dschat.settings import Settings, setting


@dataclass(frozen=True)
class StabilityArguments(Settings):
    """KL control, whitening, the critic's warm-up, the early end of an update."""

    kl_estimator: str | None = setting(
        None,
        "of the KL penalty in the reward: k1 = log(p/q), k3 = q/p - 1 + log(p/q) (default: k1; "
        "grpo has k3 in its loss instead)",
        choices=tuple(KL_ESTIMATORS),
    )
    kl_target: float | None = setting(
        None,
        "nats an answer that --kl_coef is steered towards (default: --kl_coef is fixed)",
    )
    kl_horizon: int | None = setting(
        None, "answers over which --kl_target acts in full (default: 10000)"
    )
    whiten_advantages: str = setting(
        "auto",
        "to mean 0 and variance 1 over the tokens of an iteration; auto: with gae alone",
        choices=tuple(WHITENING),
    )
    critic_warmup_iterations: int = setting(0, "first iterations in which the critic alone trains")
    update_kl_limit: float = setting(
        0.0,
        "nats a token from the sampling policy at which the actor's steps of an iteration end; "
        "0 is off",
    )

    def coefficients(self) -> dict[str, object]:
        """What `PPOConfig` takes under the same names."""
        return {
            "kl_estimator": self.kl_estimator,
            "kl_target": self.kl_target,
            "kl_horizon": self.kl_horizon,
            "whiten_advantages": self.whiten_advantages,
            "critic_warmup_iterations": self.critic_warmup_iterations,
            "update_kl_limit": self.update_kl_limit,
        }
