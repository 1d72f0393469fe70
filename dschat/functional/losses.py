"""Every scalar that is ever backpropagated, as a pure function of tensors.

Losses are sums over tokens or pairs, never means: an optimizer step divides by the count of its
accumulation group on all ranks (`mean_scale`), so that the update does not depend on micro-batch
size or on the number of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dschat.functional.returns import kl_k3


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in fp32: (..., V) logits, (...) ids -> (...)."""
    return -F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), reduction="none"
    ).view_as(targets)


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each next-token distribution in nats, fp32: (..., V) -> (...)."""
    logits = logits.float()
    return torch.logsumexp(logits, dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def mean_scale(count: float, world_size: int) -> float:
    """Factor that turns this rank's loss sum into its part of the accumulation group's mean.

    Args:
        count: tokens or pairs of the accumulation group, on all ranks.
        world_size: DeepSpeed averages gradients over the ranks; this undoes the division.
    """
    return world_size / max(count, 1.0)


def pairwise_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    real: torch.Tensor,
    margin: torch.Tensor | float = 0.0,
    centering_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum over real pairs of -log sigmoid(r_chosen - r_rejected - margin), Bradley-Terry.

    Args:
        chosen, rejected: (B,) scores.
        real: (B,) bool; rows that only fill a batch count as nothing.
        margin: (B,) or one for all, by how much the chosen answer is better (Llama 2,
            arXiv:2307.09288, eq. 2).
        centering_coefficient: weight of (r_chosen + r_rejected)^2, which keeps scores around 0
            (Eisenstein et al. 2023, arXiv:2312.09244).
        label_smoothing: probability that a preference is the wrong way round, epsilon in
            -(1 - epsilon) log sigmoid(d) - epsilon log sigmoid(-d), with d the sigmoid's argument.
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected - margin
    loss = -F.logsigmoid(difference)
    if label_smoothing:
        loss = loss + label_smoothing * difference  # log sigmoid(-d) = log sigmoid(d) - d
    if centering_coefficient:
        loss = loss + centering_coefficient * (chosen + rejected).square()
    return (loss * real).sum()


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over answer tokens of PPO's clipped objective (arXiv:1707.06347, eq. 7), negated.

    All tensors are (B, A); ratio = exp(logprobs - old_logprobs).

    Args:
        importance: weights of the tokens (`importance_weights`); None: 1 for all.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if importance is not None:
        loss = loss * importance
    return (loss * mask).sum()


def importance_weights(
    logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """(B, A) weights min(p / q, cap) of tokens that q drew in place of p; 1 outside the mask.

    Truncated importance sampling (Ionides 2008): E_q[p / q * f] = E_p[f], and the cap bounds the
    variance at the price of a bias. Both are over the entire vocabulary at the sampling
    temperature: what top-p or top-k cut away has q = 0, which no weight can bring back.

    Args:
        logprobs: (B, A) log p, of the policy before the update; no gradient flows through it.
        sampler_logprobs: (B, A) log q, of the engine that drew the tokens.
    """
    gap = (logprobs - sampler_logprobs).detach().masked_fill(~mask, 0.0)
    return gap.exp().clamp(max=cap).masked_fill(~mask, 1.0)


def kl_loss(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over answer tokens of k3, the estimate of KL(policy, reference) that GRPO adds.

    All tensors are (B, A); arXiv:2402.03300, eq. 4. It is a sum over sampled tokens, and its
    gradient goes through their probabilities.
    """
    # Masked before the exponential: 0 times the gradient of an infinite one is not a number.
    gap = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    return kl_k3(gap, torch.zeros_like(gap)).sum()


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """Sum over answer tokens of half the squared error, the worse of clipped and not.

    All tensors are (B, A); a value moves at most `clip_range` from its old self unpunished, with 0
    as far as it likes.
    """
    if not clip_range:
        return 0.5 * ((values - returns).square() * mask).sum()
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * mask).sum()
