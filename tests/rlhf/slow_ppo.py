"""PPO in plain PyTorch and float64: one text at a time, no padding, no masks, no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tiny_roles import Folders
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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


class SlowPPO:
    """Actor, critic and their frozen first selves, and one update after another."""

    def __init__(self, folders: Folders, numbers: Numbers):
        load, load_value = (
            AutoModelForCausalLM.from_pretrained,
            AutoModelForSequenceClassification.from_pretrained,
        )
        self.numbers = numbers
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

    def update(self, texts: list[Text]) -> None:
        """All epochs over all texts at once; every mean is over all answer tokens."""
        n = self.numbers
        with torch.no_grad():
            old = [logprobs(self.actor, text) for text in texts]
            old_values = [values(self.critic, text) for text in texts]
            targets = [
                self.targets(text, log_p, state)
                for text, log_p, state in zip(texts, old, old_values, strict=True)
            ]
        every = torch.cat([advantages for advantages, _ in targets])
        mean, deviation = every.mean(), math.sqrt(every.var(correction=0).item() + 1e-8)
        for _ in range(n.epochs):
            actor_loss = critic_loss = torch.zeros((), dtype=torch.float64)
            for text, log_p, state, (advantages, returns) in zip(
                texts, old, old_values, targets, strict=True
            ):
                white = (advantages - mean) / deviation
                ratio = (logprobs(self.actor, text) - log_p).exp()
                clipped = ratio.clamp(1 - n.clip, 1 + n.clip)
                actor_loss = actor_loss - torch.minimum(white * ratio, white * clipped).sum()
                value = values(self.critic, text)
                near = value.clamp(state - n.value_clip, state + n.value_clip)
                worse = torch.maximum((value - returns) ** 2, (near - returns) ** 2)
                critic_loss = critic_loss + worse.sum() / 2
            self.step(self.actor, actor_loss / len(every))
            self.step(self.critic, critic_loss / len(every))

    @torch.no_grad()
    def targets(
        self, text: Text, log_p: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages, not yet whitened, and returns of one answer."""
        n = self.numbers
        score = self.reward.score(self.reward.base_model(text.ids[None])[0])[0, -1, 0].item()
        score = min(max(score, -n.reward_clip), n.reward_clip)
        score -= 0.0 if text.ended else n.missing_eos_penalty
        rewards = -n.kl * (log_p - logprobs(self.reference, text))
        rewards[-1] += score
        length, following = len(log_p), 0.0
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
