"""KL-shaped rewards, advantages, masked mean and whitening; torch only."""

from __future__ import annotations

from collections.abc import Callable

from dschat.lazy import torch

Reduce = Callable[[list[float]], list[float]]


def identity(values: list[float]) -> list[float]:
    """The reduction of a single rank."""
    return values


def answer_mask_from(answers: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Mark answers in (B, A) generated ids: True from the first to the end token inclusive, (B, A).

    Only the first end token ends an answer; that padding has the same id does not matter.
    """
    ends_before = (answers == eos_token_id).cumsum(dim=-1) - (answers == eos_token_id).long()
    return ends_before == 0


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log(p/q) of the sampled tokens: unbiased, can be negative."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): unbiased and never negative (Schulman 2020, "Approximating KL")."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}


def shaped_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    kl_coefficient: float,
    kl_estimator: str = "k1",
) -> torch.Tensor:
    """-kl_coefficient * KL per token, the score on the last masked token.

    Args:
        scores: (B,). logprobs, ref_logprobs, mask: (B, A).
        kl_estimator: k1 takes log(p/q); k3 is never negative, so that no token earns by it.

    Returns:
        (B, A) rewards, 0 outside the mask; a row without answer tokens gets none.
    """
    # After an answer its probabilities may drift without bound, and k3 to infinity.
    penalty = KL_ESTIMATORS[kl_estimator](logprobs, ref_logprobs).where(mask, 0.0)
    rewards = -kl_coefficient * penalty
    lengths = mask.sum(dim=-1, keepdim=True)
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return rewards + torch.where(positions == lengths - 1, scores.unsqueeze(-1), 0.0)


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (arXiv:1506.02438, eq. 16) over answers that start at column 0.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1};  V is 0 after the end.

    Returns:
        advantages and returns (A + V), each (B, A), 0 outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def leave_one_out(rewards: torch.Tensor, group: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """RLOO: each reward less the mean of the others in its group (arXiv:2402.14740).

    Args:
        rewards: (B,). group: (B,) int. real: (B,) bool; the others count nowhere and get 0.

    Raises:
        ValueError: a real row is alone in its group.
    """
    total, count, own = _group_sums(rewards, group, real)
    if (count[real] < 2).any():
        raise ValueError(f"{int((count[real] < 2).sum())} answers have no other to their prompt")
    others = (total - own) / (count - 1).clamp(min=1)
    return ((own - others) * real).to(rewards.dtype)


def group_normalised(
    scores: torch.Tensor,
    group: torch.Tensor,
    real: torch.Tensor,
    eps: float = 1e-4,
    correction: int = 0,
) -> torch.Tensor:
    """GRPO: (score - mean) / (standard deviation + eps) of its group (arXiv:2402.03300).

    The deviation is the population's, or with `correction` 1 the sample's. `eps` keeps the noise of
    equal scores from becoming a signal; where they are equal to the bit, all get 0. Arguments and
    errors as in `leave_one_out`.
    """
    centred, count = _centred(scores, group, real)
    squares, _, _ = _group_sums(centred.square(), group, real)
    deviation = (squares / (count - correction).clamp(min=1)).sqrt()
    return (centred / (deviation + eps)).to(scores.dtype)


def group_centred(scores: torch.Tensor, group: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO: score - mean of its group (arXiv:2503.20783); otherwise as `group_normalised`."""
    centred, _ = _centred(scores, group, real)
    return centred.to(scores.dtype)


def _centred(
    scores: torch.Tensor, group: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores less the mean of their group, fp64, and the number of rows that count in it."""
    total, count, own = _group_sums(scores, group, real)
    if (count[real] < 2).any():
        raise ValueError(f"{int((count[real] < 2).sum())} answers have no other to their prompt")
    return (own - total / count.clamp(min=1)) * real, count


def _group_sums(
    x: torch.Tensor, group: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for each row, its group's sum of x and number of rows; and x, 0 where not real."""
    names, index = group.unique(return_inverse=True)
    own = x.double().where(real, 0.0)
    zeros = own.new_zeros(len(names))
    total = zeros.index_add(0, index, own)
    count = zeros.index_add(0, index, real.double())
    return total[index], count[index], own


def masked_mean(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = identity) -> float:
    """Mean where the mask is True, over all ranks; 0 when nothing is.

    What lies outside the mask may be anything, infinite included.
    """
    total, count = reduce([x.double().where(mask, 0.0).sum().item(), mask.sum().item()])
    return total / count if count else 0.0


def masked_moments(
    x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = identity
) -> tuple[float, float]:
    """Mean and population variance where the mask is True, over all ranks, in two passes."""
    mean = masked_mean(x, mask, reduce)
    return mean, masked_mean((x.double() - mean).square(), mask, reduce)


def whiten(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = identity) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask of the global batch; 0 elsewhere."""
    mean, variance = masked_moments(x, mask, reduce)
    return (x - mean) * (variance + 1e-8) ** -0.5 * mask
