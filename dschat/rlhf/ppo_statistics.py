"""Statistics of an iteration: means over all ranks of rollouts, advantages and steps."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from dschat.functional.returns import kl_k1, kl_k3, masked_mean, masked_moments
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.ppo_config import PPOConfig
from dschat.utils.distributed import all_reduce_max, all_reduce_sum


def rollout_statistics(experiences: list[Experience]) -> dict[str, float]:
    """Statistics of rollouts: reward, KL, lengths, ends."""
    rows = torch.cat([e.real for e in experiences])
    mask = torch.cat([e.answer_mask.flatten() for e in experiences])
    counted = torch.cat([e.counted for e in experiences])
    rewards = torch.cat([filled(e.rewards) for e in experiences])
    (scored,) = all_reduce_sum([float(counted.sum().item())])

    def per_row(values: list[torch.Tensor]) -> float:
        return masked_mean(torch.cat(values).float(), rows, all_reduce_sum)

    def per_token(values: list[torch.Tensor]) -> float:
        return masked_mean(torch.cat([v.flatten() for v in values]), mask, all_reduce_sum)

    gaps = [
        (e.sampler_logprobs - e.logprobs).abs().where(e.answer_mask, 0.0)
        for e in experiences
        if e.sampler_logprobs is not None and not e.from_sampler  # else the first step measures it
    ]
    k1 = [kl_k1(e.logprobs, e.ref_logprobs) for e in experiences]
    groups = torch.cat([e.group for e in experiences])
    # Without any score there is no mean.
    figures = mean_and_error("reward", rewards, counted, groups) if scored else {}
    lengths = torch.cat([e.answer_mask.sum(-1) for e in experiences]).float()
    figures |= mean_and_error("answer_length", lengths, rows, groups)
    figures |= {
        "kl": per_row([(k * e.answer_mask).sum(-1) for k, e in zip(k1, experiences, strict=True)]),
        "kl_per_token": per_token(k1),
        "kl_k3": per_token([kl_k3(e.logprobs, e.ref_logprobs) for e in experiences]),
        "answers": answer_count(experiences),
        "ended": per_row([e.ended for e in experiences]),
        "ref_nats_per_token": -per_token([e.ref_logprobs for e in experiences]),
    }
    if len(gaps) == len(experiences):
        (largest,) = all_reduce_max([max(gap.max().item() for gap in gaps)])
        figures |= {"decode_gap": per_token(gaps), "decode_gap_max": largest}
    return figures


def mean_and_error(
    name: str, x: torch.Tensor, mask: torch.Tensor, group: torch.Tensor
) -> dict[str, float]:
    """Mean over the answers of all ranks where the mask is True, and its standard error.

    Answers to one prompt go together: the error is by what prompts differ in. With fewer than two
    of them there is none. All are (B,).
    """
    mean = masked_mean(x, mask, all_reduce_sum)
    names, of_prompt = group[mask].unique(return_inverse=True)
    sums = x.new_zeros(len(names), dtype=torch.float64)
    sums = sums.index_add(0, of_prompt, x[mask].double() - mean)
    squares, prompts, count = all_reduce_sum(
        [sums.square().sum().item(), float(len(names)), float(mask.sum().item())]
    )
    if prompts < 2:
        return {name: mean}
    return {name: mean, f"{name}_error": math.sqrt(squares * prompts / (prompts - 1)) / count}


def zero_spread(experiences: list[Experience], missing_eos_penalty: float) -> float:
    """Share of the prompts whose answers all have one reward: these teach nothing.

    Answers without a reward are left out, and so are prompts that have no others.
    """
    real = torch.cat([e.counted for e in experiences])
    rewards = torch.cat([filled(e.rewards) - missing_eos_penalty * ~e.ended for e in experiences])
    names, group = torch.cat([e.group for e in experiences])[real].unique(return_inverse=True)
    low, high = (
        rewards.new_zeros(len(names)).scatter_reduce(
            0, group, rewards[real], how, include_self=False
        )
        for how in ("amin", "amax")
    )
    equal, prompts = all_reduce_sum([(low == high).sum().item(), float(len(names))])
    return equal / max(prompts, 1.0)


def masked_share(experiences: list[Experience]) -> float:
    """Share of the answers with a reward that are left out of the losses: cut ones."""
    counted = torch.cat([e.counted for e in experiences])
    is_masked = torch.cat([~e.loss_mask.any(-1) for e in experiences]).float()
    return masked_mean(is_masked, counted, all_reduce_sum)


def learned_statistics(
    learned: list[Experience], config: PPOConfig, has_values: bool
) -> dict[str, float]:
    """Statistics of what the update learns from, by what the configuration uses."""
    statistics = advantage_statistics(learned)
    if config.estimator.min_answers > 1:
        share = zero_spread(learned, config.missing_eos_penalty)
        statistics["frac_reward_zero_std"] = share
    if config.policy.mask_truncated_answers:
        statistics["masked"] = masked_share(learned)
    return statistics | (value_statistics(learned) if has_values else {})


def advantage_statistics(experiences: list[Experience]) -> dict[str, float]:
    """Mean and standard deviation over the losses' tokens; taken before whitening."""
    mask = torch.cat([e.loss_mask.flatten() for e in experiences])
    advantages = torch.cat([filled(e.advantages).flatten() for e in experiences])
    mean, variance = masked_moments(advantages, mask, all_reduce_sum)
    return {"advantage_mean": mean, "advantage_std": variance**0.5}


def value_statistics(experiences: list[Experience]) -> dict[str, float]:
    """Quality of the critic: explained variance, 1 - Var(returns - values) / Var(returns)."""
    mask = torch.cat([e.loss_mask.flatten() for e in experiences])
    returns = torch.cat([filled(e.returns).flatten() for e in experiences])
    errors = returns - torch.cat([filled(e.values).flatten() for e in experiences])
    mean, variance = masked_moments(returns, mask, all_reduce_sum)
    _, residual = masked_moments(errors, mask, all_reduce_sum)
    return {"returns": mean, "explained_variance": 1 - residual / variance if variance else 0.0}


def answer_count(experiences: list[Experience]) -> float:
    """Number of answers on all ranks, fillers left out."""
    return all_reduce_sum([float(sum(e.real.sum().item() for e in experiences))])[0]


class StepMeans:
    """Means over the steps of one engine: per token, and of gradient norms per step."""

    def __init__(self, role: str):
        self.role = role
        self._sums: dict[str, float] = defaultdict(float)
        self._norms: list[float] = []

    def add(self, sums: dict[str, float]) -> None:
        """Add sums over one micro-batch's tokens; their number is `tokens`.

        The loss is over `loss_count` of something else where that is given, `decode_gap` over
        `gap_tokens`.
        """
        for name, value in sums.items():
            self._sums[name] += value

    def add_norm(self, norm: float | None) -> None:
        """Add a gradient norm before clipping; None where DeepSpeed measured none."""
        if norm is not None:
            self._norms.append(float(norm))

    def means(self) -> dict[str, float]:
        """Means over all ranks, which have made the same steps; empty when there were none."""
        names = sorted(self._sums)
        totals = dict(zip(names, all_reduce_sum([self._sums[n] for n in names]), strict=True))
        tokens = max(totals.pop("tokens", 0.0), 1.0)
        counts = {
            f"{self.role}_loss": totals.pop("loss_count", tokens),
            "decode_gap": max(totals.pop("gap_tokens", 0.0), 1.0),
        }
        means = {name: total / counts.get(name, tokens) for name, total in totals.items()}
        if self._norms:
            means[f"{self.role}_grad_norm"] = sum(self._norms) / len(self._norms)
        return means
