"""Objectives of policy and critic on a micro-batch of experience, and what they report."""

from __future__ import annotations

import torch

from dschat.functional.losses import (
    RATIOS,
    answer_weights,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from dschat.functional.returns import kl_k3
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.ppo_config import PPOConfig

Sums = dict[str, torch.Tensor]  # scalars, read together when the optimizer step is made


def loss_count(e: Experience, config: PPOConfig) -> torch.Tensor:
    """Count what the policy's loss is a mean over: tokens of the loss, or answers.

    An answer that is masked because it was cut counts as an answer, as in TRL; one without a reward
    does not.
    """
    of_tokens = config.policy.loss_aggregation == "token"
    return (e.loss_mask if of_tokens else e.counted).sum()


def policy_objective(
    e: Experience,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    config: PPOConfig,
    kl_coef: float,
    *,
    moved: bool = False,
) -> tuple[torch.Tensor, Sums]:
    """Policy loss, summed over what it is a mean over, and sums to report.

    Args:
        logprobs, entropy: (B, A), of the present policy.
        kl_coef: of k3 in the loss, for estimators that have it there.
        moved: the policy has made steps since the answers were sampled.
    """
    mask, policy = e.loss_mask, config.policy
    is_sampler = e.from_sampler and not moved  # the ratio is 1 by construction
    old = logprobs.detach() if is_sampler else e.logprobs
    weights = answer_weights(mask, policy.loss_aggregation, config.sampling.max_answer_seq_len)
    ratio = RATIOS[policy.importance_level](logprobs, old, mask)
    cap, importance = config.rollout_importance_cap, None
    if cap:
        importance = importance_weights(e.logprobs, filled(e.sampler_logprobs), mask, cap)
    of_tokens = weights if importance is None else weights * importance
    loss = policy_loss(ratio, filled(e.advantages), mask, config.clip_range, of_tokens)
    if config.estimator.kl_in_loss:
        loss = loss + kl_coef * kl_loss(logprobs, e.ref_logprobs, mask, weights)
    with torch.no_grad():
        sums = {
            "tokens": mask.sum(),
            "actor_loss": loss.detach(),
            "ratio": (ratio * mask).sum(),
            # Outside the mask the two may drift apart without bound.
            "approx_kl": kl_k3(old, logprobs.where(mask, old)).sum(),
            "entropy": entropy.where(mask, 0.0).sum(),
        }
        sums |= clip_sums(ratio - 1.0, mask, config)
        if is_sampler:
            gap = (filled(e.sampler_logprobs) - logprobs).abs()
            sums |= {"decode_gap": gap.where(mask, 0.0).sum(), "gap_tokens": mask.sum()}
        if importance is not None:
            sums["importance_capped"] = ((importance >= cap) & mask).sum()
        if policy.loss_aggregation != "token":
            sums["loss_count"] = loss_count(e, config)
        return loss, sums


def clip_sums(moved: torch.Tensor, mask: torch.Tensor, config: PPOConfig) -> Sums:
    """Count the tokens whose ratio is beyond the clip range, by side where the sides differ.

    Ratios of entire answers have another name: their range is narrower by orders of magnitude, and
    a large share of them is no sign of long updates.
    """
    low, high = config.clip_range
    below = ((moved < -low) & mask).sum()
    above = ((moved > high) & mask).sum()
    is_sequence = config.policy.importance_level == "sequence"
    name = "answer_clip_fraction" if is_sequence else "clip_fraction"
    sums = {name: below + above}
    if config.policy.cliprange_high is not None:
        sums |= {f"{name}_low": below, f"{name}_high": above}
    return sums


def value_objective(e: Experience, values: torch.Tensor, clip: float) -> tuple[torch.Tensor, Sums]:
    """Value loss, summed over the tokens of the losses, and sums to report.

    Args:
        values: (B, A), of the present critic. clip: see `value_loss`.
    """
    old, mask = filled(e.values), e.loss_mask
    loss = value_loss(values, old, filled(e.returns), mask, clip)
    sums = {"tokens": mask.sum(), "critic_loss": loss.detach()}
    if clip:
        beyond = ((values - old).abs() > clip) & mask
        sums["value_clip_fraction"] = beyond.sum()
    return loss, sums
