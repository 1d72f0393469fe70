"""Losses and scores of one batch in steps 1 and 2, and figures of an entire evaluation set.

Evaluation covers the set once on any number of ranks, weighted by tokens or pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from dschat.data.collators import Batch, PackedBatch, PairBatch, SFTBatch
from dschat.models.causal_lm import eval_mode, forward_inputs
from dschat.models.logprobs import target_loss
from dschat.models.packing import packed_inputs
from dschat.models.reward_model import scores_at_end
from dschat.models.reward_statistics import RewardStatistics
from dschat.utils.distributed import all_reduce_sum, print_rank_0

BatchT = TypeVar("BatchT", bound=Batch)


def answer_loss(model: nn.Module, batch: SFTBatch) -> torch.Tensor:
    """Sum of the loss over a batch's trained tokens."""
    if isinstance(batch, PackedBatch):
        inputs = packed_inputs(model, batch.input_ids, batch.position_ids)
    else:
        inputs = forward_inputs(model, batch.input_ids, batch.attention_mask)
    return target_loss(model, inputs, batch.loss_mask)


def trained_tokens(batch: SFTBatch) -> torch.Tensor:
    """Count the tokens of a batch that the loss runs over."""
    return batch.loss_mask[:, 1:].sum()


@torch.no_grad()
def evaluate_answers(
    engine: nn.Module, loader: Iterable[SFTBatch], device: torch.device
) -> dict[str, float]:
    """Loss (nats per answer token) and perplexity over the evaluation set, all ranks."""

    def sums(batch: SFTBatch) -> dict[str, float]:
        tokens = trained_tokens(batch).item()
        return {"loss": answer_loss(engine, batch).item(), "tokens": tokens}

    totals = _totals(engine, loader, device, sums)
    loss = totals["loss"] / max(totals["tokens"], 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def pair_scores(model: nn.Module, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) scores of the chosen and (B,) of the rejected answers."""
    values = model(batch.input_ids, batch.attention_mask)
    chosen, rejected = scores_at_end(values, batch.attention_mask).chunk(2)
    return chosen, rejected


def pair_count(batch: PairBatch) -> torch.Tensor:
    """Count the pairs of a batch that the loss runs over."""
    return batch.real.sum()


@torch.no_grad()
def evaluate_pairs(
    engine: nn.Module, loader: Iterable[PairBatch], device: torch.device
) -> dict[str, float]:
    """Loss, accuracy, margin, confidence, mean and spread of the scores, over all ranks.

    Confidence is the mean of sigmoid(margin), the probability that the model gives to the
    preference: a calibrated model's equals its accuracy. Ties count as half right.
    """

    def sums(batch: PairBatch) -> dict[str, float]:
        chosen, rejected = pair_scores(engine, batch)
        return _pair_sums(chosen[batch.real], rejected[batch.real])

    totals = _totals(engine, loader, device, sums)
    pairs = max(totals.pop("pairs"), 1.0)
    figures = {name: total / pairs for name, total in totals.items()}
    variance = figures.pop("mean_square") - figures["mean_score"] ** 2
    return figures | {"score_std": math.sqrt(max(variance, 0.0))}


def _totals(
    engine: nn.Module,
    loader: Iterable[BatchT],
    device: torch.device,
    sums: Callable[[BatchT], dict[str, float]],
) -> dict[str, float]:
    """Add up the sums of every batch, in eval mode, over all ranks."""
    totals: dict[str, float] = {}
    with eval_mode(engine):
        for batch in loader:
            for name, total in sums(batch.to(device)).items():
                totals[name] = totals.get(name, 0.0) + total
    return dict(zip(totals, all_reduce_sum([*totals.values()]), strict=True))


def _pair_sums(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """Sums over the pairs of one batch: (N,) scores of the chosen, (N,) of the rejected."""
    margin = (chosen - rejected).double().cpu()
    both = torch.cat([chosen, rejected]).double().cpu()  # (2N,), each counts half a pair
    sums = {
        "loss": -F.logsigmoid(margin),
        "accuracy": (margin > 0).double() + 0.5 * (margin == 0).double(),
        "margin": margin,
        "confidence": margin.sigmoid(),
        "mean_score": both / 2,
        "mean_square": both.square() / 2,
    }
    return {name: part.sum().item() for name, part in sums.items()} | {"pairs": float(len(margin))}


def scores_summary(
    figures: Mapping[str, float], num_pairs: int, data: str
) -> RewardStatistics | None:
    """Statistics to save with the reward model, from the figures of `evaluate_pairs`.

    Args:
        data: key of the rows.

    Returns:
        None, reported in a line, where all scores are equal or some are not finite.
    """
    summary = RewardStatistics(figures["mean_score"], figures["score_std"], 2 * num_pairs, data)
    if summary.usable:
        return summary
    print_rank_0(
        f"no reward statistics are saved: over the evaluation set the scores have mean "
        f"{summary.mean:.4g} and spread {summary.std:.4g}; check the learning rate and the data"
    )
    return None
