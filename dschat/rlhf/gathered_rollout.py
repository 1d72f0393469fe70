"""Rollouts at ZeRO-3 on complete weights, which are gathered once for each call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dschat.data.batches import PromptBatch
from dschat.rlhf.generation import Sampled, SamplingConfig
from dschat.rlhf.rollout_engine import RolloutEngine
from dschat.utils.zero import gathered_whole


@dataclass(frozen=True)
class GatheredRollout:
    """Another engine, around whose calls the actor's weights are complete on every rank.

    Otherwise each token gathers the model layer by layer. It takes the memory of all weights
    meanwhile; ranks do not wait for each other between gathering and letting go.
    """

    inner: RolloutEngine  # on the module, without waiting for other ranks
    engine: nn.Module  # DeepSpeed's, at stage 3

    @property
    def refills(self) -> bool:
        """See `RolloutEngine`; True: weights are gathered once for all prompts."""
        return self.inner.refills

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        """See `RolloutEngine`."""
        with gathered_whole(self.engine):
            return self.inner.generate(prompts, sampling)

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor | None:
        """See `RolloutEngine`."""
        with gathered_whole(self.engine):
            return self.inner.next_logits(prompts)

    def weights_changed(self) -> None:
        """See `RolloutEngine`."""
        self.inner.weights_changed()
