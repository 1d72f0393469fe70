"""One PPO update from rollouts, and the statistics of it.

The stages of an iteration (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017,
arXiv:1707.06347):
  1. rollouts: sample answers, score them under every role           (rollout.py)
  2. rewards: KL penalty per token, the score on the last token      (returns.py)
  3. advantages: GAE inside the answers, whitened over all ranks     (returns.py)
  4. updates: a few epochs of clipped policy and value steps         (here)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dschat.errors import UserError
from dschat.losses import policy_loss, token_entropy, value_loss, window_scale
from dschat.rlhf.experience import Experience, minibatches
from dschat.rlhf.ptx import PTX
from dschat.rlhf.returns import (
    generalized_advantages,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_moments,
    shaped_rewards,
    whiten,
)
from dschat.rlhf.rewards import Rewards, score_statistics
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import (
    SamplingConfig,
    answer_logprobs,
    answer_values,
    make_experience,
    pad_rows,
)
from dschat.utils.data.collators import PromptBatch
from dschat.utils.distributed import all_reduce_sum
from dschat.utils.engine import backward, windows


@dataclass(frozen=True)
class PPOConfig:
    """The coefficients of PPO."""

    sampling: SamplingConfig
    kl_coefficient: float = 0.1
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    reward_clip: float = 5.0
    missing_eos_penalty: float = 0.0
    ppo_epochs: int = 1
    rollout_batch_size: int = 16
    micro_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    seed: int = 1234

    def __post_init__(self):
        # The messages name the flags that these numbers come from.
        above_zero = {
            "cliprange": self.clip_range,
            "cliprange_value": self.value_clip_range,
            "reward_clip": self.reward_clip,
        }
        for name, value in above_zero.items():
            if value <= 0:
                raise UserError(f"{name} is {value}: give a number above 0")
        not_negative = {
            "kl_coef": self.kl_coefficient,
            "missing_eos_penalty": self.missing_eos_penalty,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise UserError(f"{name} is {value}: give 0 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number in [0, 1]")
        at_least_one = {
            "ppo_epochs": self.ppo_epochs,
            "per_device_generation_batch_size": self.rollout_batch_size,
            "per_device_training_batch_size": self.micro_batch_size,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise UserError(f"{name} is {value}: give at least 1")


class DeepSpeedPPOTrainer:
    """Runs PPO over the roles of a `DeepSpeedRLHFEngine`."""

    def __init__(
        self,
        roles: DeepSpeedRLHFEngine,
        config: PPOConfig,
        world_size: int,
        rewards: Rewards | None = None,
        ptx: PTX | None = None,
    ):
        self.roles, self.config, self.world_size = roles, config, world_size
        self.rewards, self.ptx = rewards or Rewards(), ptx
        self.generator = torch.Generator().manual_seed(config.seed)

    per_rank = True  # its state is a few numbers

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the order of mini-batches stands; the rest of the state is the roles'."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])

    def rollout(self, prompts: PromptBatch) -> Experience:
        """Stage 1: sample and score one batch of prompts."""
        prompts = pad_rows(prompts, self.config.rollout_batch_size).to(self.roles.device)
        sampled = make_experience(
            self.roles,
            prompts,
            self.config.sampling,
            score_batch_size=self.config.micro_batch_size,
        )
        return self.rewards.applied(sampled, self.roles.tokenizer, self.roles.has_reward_model)

    def evaluate(self, batches: Iterable[PromptBatch]) -> dict[str, float]:
        """What the present policy earns on held-out prompts: `rollout_statistics`, no update."""
        return self.rollout_statistics([self.rollout(batch) for batch in batches])

    def with_advantages(self, experiences: list[Experience]) -> list[Experience]:
        """Stages 2 and 3, once per set of rollouts: the returns, and whitened advantages."""
        config, learned = self.config, []
        for e in experiences:
            scores = e.scores.clamp(-config.reward_clip, config.reward_clip)
            scores = scores - config.missing_eos_penalty * ~e.ended
            rewards = shaped_rewards(
                scores, e.logprobs, e.ref_logprobs, e.answer_mask, config.kl_coefficient
            )
            learned.append(
                generalized_advantages(rewards, e.values, e.answer_mask, config.gamma, config.lam)
            )
        advantages = torch.cat([a.flatten() for a, _ in learned])
        mask = torch.cat([e.answer_mask.flatten() for e in experiences])
        white = whiten(advantages, mask, all_reduce_sum).float()
        parts = white.split([a.numel() for a, _ in learned])
        return [
            e.with_returns(part.view_as(returns), returns)
            for e, part, (_, returns) in zip(experiences, parts, learned, strict=True)
        ]

    def train_rlhf(self, experiences: list[Experience]) -> dict[str, float]:
        """Stages 2 to 4: update actor and critic; returns this iteration's statistics."""
        stats = self.rollout_statistics(experiences)
        experiences = self.with_advantages(experiences)
        stats |= self.value_statistics(experiences)
        self.roles.train()
        sums: dict[str, float] = defaultdict(float)
        for _ in range(self.config.ppo_epochs):
            shuffled = minibatches(experiences, self.config.micro_batch_size, self.generator)
            for window in windows(shuffled, self.config.gradient_accumulation_steps):
                for name, value in self.optimizer_step(window).items():
                    sums[name] += value
        names = sorted(sums)
        totals = dict(zip(names, all_reduce_sum([sums[n] for n in names]), strict=True))
        tokens = max(totals.pop("tokens"), 1.0)
        stats |= self.ptx.statistics() if self.ptx is not None else {}
        return stats | {name: total / tokens for name, total in totals.items()}

    def optimizer_step(self, window: list[Experience]) -> dict[str, float]:
        """One step of actor and critic over a window; means run over its tokens on all ranks."""
        tokens = all_reduce_sum([float(sum(e.answer_mask.sum().item() for e in window))])[0]
        scale = window_scale(tokens, self.world_size)
        sums: dict[str, float] = defaultdict(float)
        if self.ptx is not None:
            self.ptx.backward(self.roles.actor, [len(e.scores) for e in window])
        for i, e in enumerate(window):
            last = i == len(window) - 1
            actor_loss, statistics = self.actor_loss(e)
            backward(self.roles.actor, actor_loss * scale, last)
            critic_loss = self.critic_loss(e)
            backward(self.roles.critic, critic_loss * scale, last)
            statistics |= {"actor_loss": actor_loss.item(), "critic_loss": critic_loss.item()}
            for name, value in statistics.items():
                sums[name] += value
        self.roles.actor.step()
        self.roles.critic.step()
        if self.roles.ema is not None and self.roles.actor.was_step_applied():
            self.roles.ema.update()
        return sums

    def actor_loss(self, e: Experience) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy loss of one mini-batch, summed over its tokens, and sums to report."""
        logprobs, logits = answer_logprobs(
            self.roles.actor, e.sequences, e.attention_mask, e.answer_mask.shape[1]
        )
        clip = self.config.clip_range
        loss = policy_loss(logprobs, e.logprobs, e.advantages, e.answer_mask, clip)
        with torch.no_grad():
            # Outside the mask the two may drift apart without bound: there, a ratio of 1.
            kept = logprobs.where(e.answer_mask, e.logprobs)
            ratio = torch.exp(kept - e.logprobs)
            entropy = token_entropy(logits[e.answer_mask]).sum()
            statistics = {
                "tokens": e.answer_mask.sum().item(),
                "ratio": (ratio * e.answer_mask).sum().item(),
                "clip_fraction": (((ratio - 1).abs() > clip) & e.answer_mask).sum().item(),
                "approx_kl": kl_k3(e.logprobs, kept).sum().item(),
                "entropy": entropy.item(),
            }
        return loss, statistics

    def critic_loss(self, e: Experience) -> torch.Tensor:
        """The value loss of one mini-batch, summed over its tokens."""
        values = answer_values(
            self.roles.critic, e.sequences, e.attention_mask, e.answer_mask.shape[1]
        )
        return value_loss(values, e.values, e.returns, e.answer_mask, self.config.value_clip_range)

    def rollout_statistics(self, experiences: list[Experience]) -> dict[str, float]:
        """Means over all ranks of what was sampled: reward, KL, lengths, ends."""
        rows = torch.cat([e.real for e in experiences])
        mask = torch.cat([e.answer_mask.flatten() for e in experiences])

        def per_row(values: list[torch.Tensor]) -> float:
            return masked_mean(torch.cat(values).float(), rows, all_reduce_sum)

        def per_token(values: list[torch.Tensor]) -> float:
            return masked_mean(torch.cat([v.flatten() for v in values]), mask, all_reduce_sum)

        k1 = [kl_k1(e.logprobs, e.ref_logprobs) for e in experiences]
        return {
            "reward": per_row([e.scores for e in experiences]),
            "kl": per_row(
                [(k * e.answer_mask).sum(-1) for k, e in zip(k1, experiences, strict=True)]
            ),
            "kl_per_token": per_token(k1),
            "kl_k3": per_token([kl_k3(e.logprobs, e.ref_logprobs) for e in experiences]),
            "answer_length": per_row([e.answer_mask.sum(-1) for e in experiences]),
            "ended": per_row([e.ended for e in experiences]),
            "ref_nats_per_token": -per_token([e.ref_logprobs for e in experiences]),
            **score_statistics(experiences, self.config.reward_clip),
        }

    def value_statistics(self, experiences: list[Experience]) -> dict[str, float]:
        """How well the critic saw the returns coming: 1 - Var(returns - values) / Var(returns)."""
        mask = torch.cat([e.answer_mask.flatten() for e in experiences])
        returns = torch.cat([e.returns.flatten() for e in experiences])
        errors = returns - torch.cat([e.values.flatten() for e in experiences])
        mean, variance = masked_moments(returns, mask, all_reduce_sum)
        _, residual = masked_moments(errors, mask, all_reduce_sum)
        return {"returns": mean, "explained_variance": 1 - residual / variance if variance else 0.0}
