"""Drawing tokens from logits as transformers' `generate` does, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from dschat.rlhf.generation import SamplingConfig


@dataclass(frozen=True)
class Drawing:
    """Draws the next token of each row; the noise is that of torch's generator."""

    sampling: SamplingConfig
    end: int  # id of the end token

    def __call__(
        self, logits: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw.

        Args:
            logits: (N, V). lengths: (N,) tokens that the answers have already.

        Returns:
            (N,) ids; (N,) fp32 log-probabilities of them over the entire vocabulary, at the
            sampling temperature: the policy's, whether the end token could be drawn or not.
        """
        scores, temperature = logits.float(), self.sampling.temperature
        if temperature != 1.0 and not self.sampling.greedy:
            scores = scores / temperature
        logprobs = kept = scores.log_softmax(-1)
        if self.sampling.min_answer_seq_len:
            early = lengths < self.sampling.min_answer_seq_len
            kept = logprobs.clone()
            kept[:, self.end] = torch.where(early, -torch.inf, logprobs[:, self.end])
        if self.sampling.greedy:
            return self._with_logprobs(logprobs, kept.argmax(-1))
        for warper in self._filters():
            kept = warper(None, kept)  # neither looks at the tokens before
        # The token at which the sum of probabilities passes a uniform number; fp64, in which no
        # token of a large vocabulary is rounded away.
        reached = kept.double().exp().cumsum(-1)
        drawn = torch.rand(len(kept), 1, dtype=reached.dtype, device=kept.device) * reached[:, -1:]
        tokens = torch.searchsorted(reached, drawn, right=True).squeeze(-1)
        return self._with_logprobs(logprobs, tokens.clamp(max=kept.shape[-1] - 1))

    @staticmethod
    def _with_logprobs(
        logprobs: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def _filters(self) -> list[LogitsProcessor]:
        filters: list[LogitsProcessor] = []
        if self.sampling.top_k:
            filters.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            filters.append(TopPLogitsWarper(self.sampling.top_p))
        return filters
