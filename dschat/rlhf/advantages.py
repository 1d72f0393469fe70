"""From scored rollouts to what each answer token is worth, by a critic or by other answers."""

from __future__ import annotations

import torch

from dschat.functional.returns import (
    Reduce,
    generalized_advantages,
    group_normalised,
    identity,
    leave_one_out,
    shaped_rewards,
    whiten,
)
from dschat.rlhf.experience import Experience
from dschat.rlhf.ppo_config import PPOConfig


def with_advantages(
    experiences: list[Experience], config: PPOConfig, kl_coefficient: float
) -> list[Experience]:
    """The rollouts of one iteration with advantages, not yet whitened; under GAE also returns.

    A group's answers may be spread over the rollouts, not over the ranks.
    """
    rewards = [_rewards(e, config, kl_coefficient) for e in experiences]
    if config.advantage_estimator == "gae":
        learned = [
            generalized_advantages(r, e.values, e.answer_mask, config.gamma, config.lam)
            for r, e in zip(rewards, experiences, strict=True)
        ]
        return [e.with_returns(*pair) for e, pair in zip(experiences, learned, strict=True)]
    # One number a sequence, the same for each of its tokens.
    compare = {"rloo": leave_one_out, "grpo": group_normalised}[config.advantage_estimator]
    advantages = compare(
        torch.cat([r.sum(-1) for r in rewards]),
        torch.cat([e.group for e in experiences]),
        torch.cat([e.real for e in experiences]),
    )
    parts = advantages.split([len(e.scores) for e in experiences])
    return [
        e.with_returns(part.unsqueeze(-1) * e.answer_mask)
        for e, part in zip(experiences, parts, strict=True)
    ]


def _rewards(e: Experience, config: PPOConfig, kl_coefficient: float) -> torch.Tensor:
    """(B, A): the clipped score less what a missing end costs, and the KL penalty of each token."""
    scores = e.scores.clamp(-config.reward_clip, config.reward_clip)
    scores = scores - config.missing_eos_penalty * ~e.ended
    return shaped_rewards(
        scores,
        e.logprobs,
        e.ref_logprobs,
        e.answer_mask,
        0.0 if config.kl_in_loss else kl_coefficient,
        config.kl_estimator or "k1",
    )


def whitened(experiences: list[Experience], reduce: Reduce = identity) -> list[Experience]:
    """The same with advantages of mean 0 and variance 1 over all answer tokens of all ranks."""
    advantages = torch.cat([e.advantages.flatten() for e in experiences])
    mask = torch.cat([e.answer_mask.flatten() for e in experiences])
    white = whiten(advantages, mask, reduce).float()
    parts = white.split([e.advantages.numel() for e in experiences])
    return [
        e.with_returns(part.view_as(e.advantages), e.returns)
        for e, part in zip(experiences, parts, strict=True)
    ]
