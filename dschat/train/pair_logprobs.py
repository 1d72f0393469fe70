"""Log-probabilities of a batch's answers: of pairs, and of answers to other prompts."""

from __future__ import annotations

import torch
from torch import nn

from dschat.data.batches import MismatchedBatch, PairBatch, PreferenceBatch
from dschat.models.logprobs import target_logprobs


def pair_logprobs(model: nn.Module, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) log-probabilities of the chosen and (B,) of the rejected answers, end tokens included.

    Of a token in fp32, summed in fp64: over 4,096 tokens a sum in fp32 is good to 5e-4 nats.
    """
    found = target_logprobs(model, batch.input_ids, batch.attention_mask, batch.answer_mask)
    chosen, rejected = found.double().sum(-1).chunk(2)
    return chosen, rejected


def mismatched_logprobs(model: nn.Module, batch: PreferenceBatch) -> torch.Tensor:
    """(B,) log-probabilities of answers to other prompts, as in `pair_logprobs`."""
    assert isinstance(batch, MismatchedBatch)
    others = batch.mismatched
    found = target_logprobs(model, others.input_ids, others.attention_mask, others.loss_mask)
    return found.double().sum(-1)
