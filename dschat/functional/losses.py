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


def token_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(B, A): p(token) / p_old(token); 1 outside the mask. All tensors are (B, A)."""
    return torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))


def sequence_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(B, A): (p(answer) / p_old(answer)) ** (1 / tokens), for all tokens of an answer alike.

    GSPO's ratio (arXiv:2507.18071, eq. 7); its gradient goes through every token of the answer.
    """
    gap = (logprobs - old_logprobs).masked_fill(~mask, 0.0).sum(dim=-1, keepdim=True)
    mean = gap / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.exp(mean.expand_as(logprobs).masked_fill(~mask, 0.0))


RATIOS = {"token": token_ratio, "sequence": sequence_ratio}


def answer_weights(mask: torch.Tensor, aggregation: str, longest: int) -> torch.Tensor:
    """(B, 1): weight of the tokens of each answer in the policy's loss.

    Args:
        mask: (B, A). longest: tokens that an answer may have.
        aggregation: `token` weighs all tokens alike (DAPO, arXiv:2503.14476); `answer` all answers,
            each a mean over its tokens (GRPO, arXiv:2402.03300); `constant` divides an answer's sum
            by `longest` (Dr. GRPO, arXiv:2503.20783). The loss is a mean over the tokens of an
            optimizer step under the first, over its answers under the others.
    """
    lengths = mask.sum(dim=-1, keepdim=True).float()
    if aggregation == "answer":
        return 1.0 / lengths.clamp(min=1.0)
    return torch.full_like(lengths, 1.0 if aggregation == "token" else 1.0 / longest)


def policy_loss(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: tuple[float, float],
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over answer tokens of PPO's clipped objective (arXiv:1707.06347, eq. 7), negated.

    Args:
        ratio, advantages, mask: (B, A).
        clip_range: the ratio is clipped to [1 - first, 1 + second]; a larger second one leaves
            unlikely tokens room to rise (DAPO, arXiv:2503.14476, eq. 10).
        weights: (B, A) or (B, 1), of tokens (`answer_weights`, `importance_weights`); None: 1.
    """
    low, high = clip_range
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if weights is not None:
        loss = loss * weights
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


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over answer tokens of k3, the estimate of KL(policy, reference) that GRPO adds.

    All tensors are (B, A), `weights` may be (B, 1); arXiv:2402.03300, eq. 4. It is a sum over
    sampled tokens, and its gradient goes through their probabilities.
    """
    # Masked before the exponential: 0 times the gradient of an infinite one is not a number.
    gap = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    loss = kl_k3(gap, torch.zeros_like(gap))
    return (loss if weights is None else loss * weights).sum()


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
