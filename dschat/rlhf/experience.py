"""Experience: one rollout as a typed record with shapes; split into mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Experience:
    """B prompts padded on the left to P tokens, and answers of up to A tokens sampled for them."""

    sequences: torch.Tensor  # (B, P + A) int64
    attention_mask: torch.Tensor  # (B, P + A) bool: prompt without padding, answer with its end
    answer_mask: torch.Tensor  # (B, A) bool
    ended: torch.Tensor  # (B,) bool: the answer has its end token, or a stop string
    real: torch.Tensor  # (B,) bool: False for rows that only fill the batch
    logprobs: torch.Tensor  # (B, A) fp32, the sampling policy's; 0 behind an answer's end
    ref_logprobs: torch.Tensor  # (B, A) fp32, likewise
    values: torch.Tensor | None  # (B, A) fp32, of the state before each token; None: no critic
    scores: torch.Tensor  # (B,) fp32, the reward model's; see rewards.py for what they become
    group: torch.Tensor  # (B,) int64: answers to one prompt share a number, on this rank alone
    advantages: torch.Tensor | None = None  # (B, A)
    returns: torch.Tensor | None = None  # (B, A)
    model_scores: torch.Tensor | None = None  # (B,) the reward model's own
    function_scores: torch.Tensor | None = None  # (B,) the reward function's own
    # Of a whole iteration's generation: its first experience alone tells them.
    generation_seconds: float = 0.0
    generation_steps: int = 0  # decoding steps, in sequence

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.sequences.shape[1] - self.answer_mask.shape[1]

    @property
    def answers(self) -> torch.Tensor:
        """(B, A) ids of the answers."""
        return self.sequences[:, self.prompt_length :]

    def with_returns(
        self, advantages: torch.Tensor, returns: torch.Tensor | None = None
    ) -> Experience:
        """The same rollout with what the update learns from."""
        return replace(self, advantages=advantages, returns=returns)

    def rows(self, index: torch.Tensor) -> Experience:
        """The rows of `index`, in its order."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {n: c[index] for n, c in columns.items() if isinstance(c, torch.Tensor)}
        return replace(self, **picked)


def minibatches(
    experiences: list[Experience], size: int, generator: torch.Generator
) -> Iterator[Experience]:
    """Every row once, in shuffled mini-batches of `size` rows of one rollout each."""
    for experience in experiences:
        order = torch.randperm(len(experience.scores), generator=generator)
        for chunk in order.split(size):
            yield experience.rows(chunk.to(experience.scores.device))
