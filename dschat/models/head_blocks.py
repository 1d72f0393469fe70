"""Log-probabilities by an output head, in blocks of tokens: no tensor of all of them x vocabulary.

The gradient of a token's log-probability with respect to the token's state is (one-hot - softmax)
times the head, which is known as soon as the block's logits are. It is computed beside the value,
while these logits exist; the backward pass scales it and computes nothing a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dschat.functional.losses import token_entropy, token_logprobs

BLOCK_BYTES = 64 * 2**20  # of fp32 logits at one time
Tensors = Callable[[torch.Tensor], torch.Tensor]
Columns = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class HeadBlocks:
    """An output head that scores states.

    Attributes:
        head: (N, H) -> (N, V) logits. parameters: those of it that train.
        temperature: logits are divided by it.
        with_entropy: score the entropy as well, without gradient.
    """

    head: Tensors
    vocabulary: int
    parameters: Sequence[nn.Parameter] = ()
    temperature: float = 1.0
    with_entropy: bool = False

    def columns(self, states: torch.Tensor, targets: torch.Tensor) -> Columns:
        """(N, H) states and (N,) targets -> (N,) log-probabilities and, with_entropy, entropies.

        The gradient of a head that trains needs each token's weight in the loss, which the backward
        pass alone knows: its blocks are made again there.
        """
        if not torch.is_grad_enabled():
            return self._joined(self._block, states, targets)
        if self.parameters:
            return self._joined(self._again, states, targets)
        return _BesideGradient.apply(self, states, targets)

    def loss(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(target), a scalar; no block is made twice, whatever trains."""
        if self.parameters and torch.is_grad_enabled():
            return -_BesideGradient.apply(self, states, targets, *self.parameters)
        return -self.columns(states, targets)[0].sum()

    def split(self, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Split tensors over tokens into blocks."""
        rows = max(1, BLOCK_BYTES // (4 * self.vocabulary))
        return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))

    def with_gradients(
        self, states: torch.Tensor, targets: torch.Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Columns, tuple[torch.Tensor, ...]]:
        """Score one block; also gradients of its summed log-probabilities: states, parameters."""
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            logits = self._logits(leaf)
        # One softmax serves values, entropies, and the gradient of the logits: one-hot - softmax.
        logprobs, wanted = logits.detach().log_softmax(-1), targets.unsqueeze(-1)
        probabilities, picked = logprobs.exp(), logprobs.gather(-1, wanted)
        columns = [picked.squeeze(-1)]
        if self.with_entropy:
            columns.append(logprobs.mul_(probabilities).sum(-1).neg_())
        gradient = probabilities.neg_().scatter_add_(-1, wanted, torch.ones_like(picked))
        del logprobs
        gradients = torch.autograd.grad(
            logits, [leaf, *parameters], gradient, allow_unused=True, materialize_grads=True
        )
        return tuple(columns), gradients

    def _joined(
        self, score: Callable[..., Columns], states: torch.Tensor, targets: torch.Tensor
    ) -> Columns:
        return _cat([score(*block) for block in self.split(states, targets)])

    def _again(self, states: torch.Tensor, targets: torch.Tensor) -> Columns:
        # Nothing in a block is drawn at random: dropout is off.
        return checkpoint(
            self._block, states, targets, use_reentrant=False, preserve_rng_state=False
        )

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """(N, V) in fp32, at the temperature."""
        logits = self.head(states).float()
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _block(self, states: torch.Tensor, targets: torch.Tensor) -> Columns:
        logits = self._logits(states)
        logprobs = token_logprobs(logits, targets)
        # The entropy comes last: the backward pass needs nothing of it and does not make it again.
        return (logprobs, token_entropy(logits.detach())) if self.with_entropy else (logprobs,)


class _BesideGradient(torch.autograd.Function):
    """Columns of all tokens; with parameters that train, the sum of their log-probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        scorer: HeadBlocks,
        states: torch.Tensor,
        targets: torch.Tensor,
        *trained: nn.Parameter,
    ) -> Columns | torch.Tensor:
        gradient, parts = torch.empty_like(states), []
        # Sums over blocks are kept in fp32.
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for block, wanted, place in scorer.split(states, targets, gradient):
            columns, (found, *others) = scorer.with_gradients(block, wanted, trained)
            parts.append(columns)
            place.copy_(found)
            for total, other in zip(sums, others, strict=True):
                total += other
        own = [total.to(p.dtype) for total, p in zip(sums, trained, strict=True)]
        ctx.save_for_backward(gradient, *own)
        columns = _cat(parts)
        if trained:
            return columns[0].sum()
        ctx.mark_non_differentiable(*columns[1:])
        return columns

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor, *_: torch.Tensor) -> tuple:
        gradient, *own = ctx.saved_tensors
        by_row = weights[:, None] if weights.dim() else weights  # (N,) of columns, () of a sum
        scaled = (by_row * gradient).to(gradient.dtype)
        return None, scaled, None, *((weights * g).to(g.dtype) for g in own)


def _cat(parts: Sequence[Columns]) -> Columns:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
