"""From scored rollouts to advantages: rewards of tokens, the KL coefficient, whitening."""

from __future__ import annotations

from dataclasses import replace

import torch

from dschat.functional.returns import Reduce, identity, shaped_rewards, whiten
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.ppo_config import PPOConfig

LARGEST_ERROR = 0.2  # of the KL target; what goes beyond it counts as this much


class KLController:
    """Coefficient of the KL penalty: fixed, or steered by proportional control of its logarithm.

    error = clip(KL / kl_target - 1, -0.2, 0.2),  beta <- beta * (1 + error * answers / kl_horizon)

    (Ziegler et al. 2019, arXiv:1909.08593.) The paper's gain of 0.1 an iteration is a horizon of
    ten iterations' answers. More answers in one iteration than the horizon count as one horizon, so
    that beta stays above 0.
    """

    def __init__(self, config: PPOConfig):
        self.config, self.coefficient = config, config.kl_coef

    def update(self, kl: float, answers: float) -> None:
        """Update the coefficient after an iteration.

        Args:
            kl: mean over its answers, on all ranks, of log(policy / reference), nats.
            answers: their number.
        """
        target = self.config.kl_target
        if target is None:
            return
        error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        self.coefficient *= 1.0 + error * min(answers / self.config.kl_horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """Present coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the coefficient."""
        self.coefficient = state["coefficient"]


def with_advantages(
    experiences: list[Experience], config: PPOConfig, kl_coef: float
) -> list[Experience]:
    """Add advantages, not yet whitened, to the rollouts of one iteration; with a critic returns.

    Answers without a reward are left out of every comparison and of the losses; those that were cut
    are left out of the losses alone, with `mask_truncated_answers`.
    """
    rewards = [token_rewards(e, config, kl_coef) for e in experiences]
    learned = config.estimator.advantages(experiences, rewards, config.gamma, config.lam)
    masks = config.policy.mask_truncated_answers
    trained = [e.counted & e.ended if masks else e.counted for e in learned]
    return [
        replace(e, trained=e.answer_mask & rows.unsqueeze(-1))
        for e, rows in zip(learned, trained, strict=True)
    ]


def token_rewards(e: Experience, config: PPOConfig, kl_coef: float) -> torch.Tensor:
    """(B, A): the reward less what a missing end costs, and the KL penalty of each token."""
    scores = filled(e.rewards) - config.missing_eos_penalty * ~e.ended
    return shaped_rewards(
        scores,
        e.logprobs,
        e.ref_logprobs,
        e.answer_mask,
        0.0 if config.estimator.kl_in_loss else kl_coef,
        config.kl_estimator or "k1",
    )


def whitened(experiences: list[Experience], reduce: Reduce = identity) -> list[Experience]:
    """Scale advantages to mean 0 and variance 1 over all tokens of the losses on all ranks."""
    advantages = torch.cat([filled(e.advantages).flatten() for e in experiences])
    mask = torch.cat([e.loss_mask.flatten() for e in experiences])
    white = whiten(advantages, mask, reduce).float()
    parts = white.split([e.answer_mask.numel() for e in experiences])
    return [
        e.with_returns(part.view_as(e.answer_mask), e.returns)
        for e, part in zip(experiences, parts, strict=True)
    ]
