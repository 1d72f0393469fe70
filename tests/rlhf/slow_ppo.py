"""PPO in plain PyTorch and float64: one text at a time, no padding, no masks, no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.rlhf.tiny_roles import Folders

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Text:
    """A prompt and the answer sampled for it; `ended` says whether the end token is there."""

    ids: torch.Tensor  # (T,)
    prompt: int  # tokens of it
    ended: bool


@dataclass(frozen=True)
class Numbers:
    """PPO's coefficients, and what the optimizer takes."""

    kl: float
    clip: float
    value_clip: float
    gamma: float
    lam: float
    reward_clip: float
    missing_eos_penalty: float
    epochs: int
    learning_rate: float
    eps: float
    max_norm: float
    estimator: str = "gae"
    kl_estimator: str = "k1"
    whitens: bool = True
    kl_target: float | None = None
    kl_horizon: float = 1.0
    warmup: int = 0
    kl_limit: float = math.inf


class SlowPPO:
    """Actor, critic and their frozen first selves, and one update after another."""

    def __init__(self, folders: Folders, numbers: Numbers):
        load, load_value = (
            AutoModelForCausalLM.from_pretrained,
            AutoModelForSequenceClassification.from_pretrained,
        )
        self.numbers, self.beta, self.updates = numbers, numbers.kl, 0
        self.actor, self.reference = (load(folders.actor, dtype=torch.float64) for _ in range(2))
        self.critic, self.reward = (
            load_value(folders.critic, dtype=torch.float64) for _ in range(2)
        )
        self.optimizers = {
            model: torch.optim.AdamW(
                model.eval().parameters(),
                lr=numbers.learning_rate,
                betas=BETAS,
                eps=numbers.eps,
                weight_decay=0.0,
            )
            for model in (self.actor, self.critic)
        }

    def update(self, texts: list[Text], groups: list[int] | None = None) -> int:
        """All epochs over all texts at once; every mean is over all answer tokens.

        Args:
            groups: texts of one number answer the same prompt.

        Returns:
            How many steps the actor made.
        """
        n = self.numbers
        with torch.no_grad():
            old = [logprobs(self.actor, text) for text in texts]
            first = [logprobs(self.reference, text) for text in texts]
            old_values = [values(self.critic, text) for text in texts]
            rewards = [self.rewards(*x) for x in zip(texts, old, first, strict=True)]
        if n.estimator == "gae":
            targets = [self.gae(r, state) for r, state in zip(rewards, old_values, strict=True)]
        else:
            worth = self.compared([sum(r.tolist()) for r in rewards], groups)
            targets = [(torch.full_like(r, w), r) for r, w in zip(rewards, worth, strict=True)]
        every = torch.cat([advantages for advantages, _ in targets])
        mean, deviation = every.mean(), math.sqrt(every.var(correction=0).item() + 1e-8)
        if not n.whitens:
            mean, deviation = 0.0, 1.0
        stopped, made = self.updates < n.warmup, 0
        white = [(advantages - mean) / deviation for advantages, _ in targets]
        returns = [r for _, r in targets]
        for _ in range(n.epochs):
            stopped = stopped or self.moved(texts, old) > n.kl_limit
            if not stopped:
                sums = map(self.policy_loss, texts, old, first, white)
                self.step(self.actor, sum(sums) / len(every))
                made += 1
            if n.estimator == "gae":
                sums = map(self.value_loss, texts, old_values, returns)
                self.step(self.critic, sum(sums) / len(every))
        self.updates += 1
        if n.kl_target is not None and self.updates > n.warmup:
            kl = sum((p - q).sum().item() for p, q in zip(old, first, strict=True)) / len(texts)
            error = max(-0.2, min(0.2, (kl - n.kl_target) / n.kl_target))
            self.beta = self.beta + self.beta * error * len(texts) / n.kl_horizon
        return made

    def policy_loss(
        self, text: Text, log_p: torch.Tensor, log_q: torch.Tensor, worth: torch.Tensor
    ) -> torch.Tensor:
        """Over the tokens of one answer; `log_p` are those of the policy that sampled."""
        n, now = self.numbers, logprobs(self.actor, text)
        ratio = (now - log_p).exp()
        clipped = ratio.clamp(1 - n.clip, 1 + n.clip)
        loss = -torch.minimum(worth * ratio, worth * clipped).sum()
        if n.estimator == "grpo":
            q_over_p = log_q.exp() / now.exp()
            loss = loss + self.beta * (q_over_p - q_over_p.log() - 1).sum()
        return loss

    def value_loss(self, text: Text, state: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        """Over the tokens of one answer; `state` are the values at the time of sampling."""
        n, value = self.numbers, values(self.critic, text)
        near = value.clamp(state - n.value_clip, state + n.value_clip)
        return torch.maximum((value - returns) ** 2, (near - returns) ** 2).sum() / 2

    @torch.no_grad()
    def moved(self, texts: list[Text], old: list[torch.Tensor]) -> float:
        """Mean over all answer tokens of now/old - 1 - log(now/old)."""
        ratios = [
            (logprobs(self.actor, text) - log_p).exp()
            for text, log_p in zip(texts, old, strict=True)
        ]
        every = [r - 1 - math.log(r) for ratio in ratios for r in ratio.tolist()]
        return sum(every) / len(every)

    @torch.no_grad()
    def rewards(self, text: Text, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Of each answer token: the KL penalty, on the last the score as well."""
        n = self.numbers
        score = self.reward.score(self.reward.base_model(text.ids[None])[0])[0, -1, 0].item()
        score = min(max(score, -n.reward_clip), n.reward_clip)
        score -= 0.0 if text.ended else n.missing_eos_penalty
        rewards = torch.zeros(len(log_p), dtype=torch.float64)
        if n.estimator != "grpo":
            for t, (p, q) in enumerate(zip(log_p.tolist(), log_q.tolist(), strict=True)):
                kl = p - q if n.kl_estimator == "k1" else math.exp(q - p) - 1 - (q - p)
                rewards[t] = -self.beta * kl
        rewards[-1] += score
        return rewards

    def compared(self, totals: list[float], groups: list[int]) -> list[float]:
        """What each answer is worth beside the others to its prompt."""
        worth = []
        for i, (total, group) in enumerate(zip(totals, groups, strict=True)):
            mates = [t for t, g in zip(totals, groups, strict=True) if g == group]
            if self.numbers.estimator == "rloo":
                others = [
                    t
                    for j, (t, g) in enumerate(zip(totals, groups, strict=True))
                    if g == group and j != i
                ]
                worth.append(total - sum(others) / len(others))
            else:
                mean = sum(mates) / len(mates)
                deviation = math.sqrt(sum((t - mean) ** 2 for t in mates) / len(mates))
                worth.append((total - mean) / (deviation + 1e-4))
        return worth

    def gae(self, rewards: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages, not yet whitened, and returns of one answer."""
        n = self.numbers
        length, following = len(rewards), 0.0
        advantages = torch.zeros(length, dtype=torch.float64)
        for t in reversed(range(length)):
            after = state[t + 1].item() if t + 1 < length else 0.0
            delta = rewards[t].item() + n.gamma * after - state[t].item()
            following = delta + n.gamma * n.lam * following
            advantages[t] = following
        return advantages, advantages + state

    def step(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Backward, clip the gradient's norm, AdamW."""
        self.optimizers[model].zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        if norm > self.numbers.max_norm:
            for gradient in gradients:
                gradient.mul_(self.numbers.max_norm / (norm + 1e-6))
        self.optimizers[model].step()


def logprobs(model: nn.Module, text: Text) -> torch.Tensor:
    """log p of each answer token, (A,)."""
    every = model(text.ids[None]).logits[0].log_softmax(-1)
    answer = range(text.prompt, len(text.ids))
    return torch.stack([every[t - 1, text.ids[t]] for t in answer])


def values(model: nn.Module, text: Text) -> torch.Tensor:
    """The critic's value before each answer token, (A,)."""
    every = model.score(model.base_model(text.ids[None])[0])[0, :, 0]
    return every[text.prompt - 1 : -1]
