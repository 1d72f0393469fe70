"""What steps 1 and 2 train and evaluate by: one batch's loss or scores, one whole set's figures.

Evaluation covers the whole set once on any number of ranks, weighted by tokens or pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dschat.data.collators import PackedBatch, PairBatch, SFTBatch
from dschat.data.loaders import Loader
from dschat.functional.losses import sft_loss
from dschat.models.causal_lm import forward_inputs
from dschat.models.packing import packed_inputs
from dschat.models.reward_model import scores_at_end
from dschat.models.reward_statistics import RewardStatistics
from dschat.utils.distributed import all_reduce_sum, print_rank_0


def answer_loss(model: nn.Module, batch: SFTBatch) -> torch.Tensor:
    """The summed loss of a batch's trained tokens."""
    if isinstance(batch, PackedBatch):
        inputs = packed_inputs(model, batch.input_ids, batch.position_ids)
    else:
        inputs = forward_inputs(model, batch.input_ids, batch.attention_mask)
    logits = model(**inputs, use_cache=False).logits
    return sft_loss(logits, batch.input_ids, batch.loss_mask)


def trained_tokens(batch: SFTBatch) -> torch.Tensor:
    """How many tokens of a batch the loss runs over."""
    return batch.loss_mask[:, 1:].sum()


@torch.no_grad()
def evaluate_answers(engine: nn.Module, loader: Loader, device: torch.device) -> dict[str, float]:
    """Loss (nats per answer token) and perplexity over the whole evaluation set, all ranks."""
    was_training = engine.training
    engine.eval()
    total = tokens = 0.0
    for batch in loader:
        batch = batch.to(device)
        total += answer_loss(engine, batch).item()
        tokens += trained_tokens(batch).item()
    engine.train(was_training)
    total, tokens = all_reduce_sum([total, tokens])
    loss = total / max(tokens, 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def pair_scores(model: nn.Module, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) scores of the chosen and (B,) of the rejected answers."""
    values = model(batch.input_ids, batch.attention_mask)
    return scores_at_end(values, batch.attention_mask).chunk(2)


def pairs(batch: PairBatch) -> torch.Tensor:
    """How many pairs of a batch the loss runs over."""
    return batch.real.sum()


@torch.no_grad()
def evaluate_pairs(engine: nn.Module, loader: Loader, device: torch.device) -> dict[str, float]:
    """Loss, accuracy, margin, confidence, mean and spread of the scores, over all ranks.

    Confidence is the mean of sigmoid(margin), the probability that the model gives to the
    preference: a calibrated model's equals its accuracy. Ties count as half right.
    """
    was_training = engine.training
    engine.eval()
    sums = torch.zeros(7, dtype=torch.float64)
    for batch in loader:
        batch = batch.to(device)
        chosen, rejected = pair_scores(engine, batch)
        margin = (chosen - rejected)[batch.real].double().cpu()
        both = torch.cat([chosen[batch.real], rejected[batch.real]]).double().cpu()
        won = (margin > 0).double() + 0.5 * (margin == 0).double()
        loss = -F.logsigmoid(margin)
        parts = [loss, won, margin, margin.sigmoid(), both / 2, both.square() / 2]
        counted = [*(part.sum().item() for part in parts), len(margin)]
        sums += torch.tensor(counted, dtype=torch.float64)
    engine.train(was_training)
    *sums, count = all_reduce_sum(sums.tolist())
    names = ("loss", "accuracy", "margin", "confidence", "mean_score")
    *means, mean_square = (total / max(count, 1.0) for total in sums)
    figures = dict(zip(names, means, strict=True))
    figures["score_std"] = math.sqrt(max(mean_square - figures["mean_score"] ** 2, 0.0))
    return figures


def scores_summary(
    figures: Mapping[str, float], num_pairs: int, data: str
) -> RewardStatistics | None:
    """What is saved of `evaluate_pairs`' figures with the reward model.

    Args:
        data: key of the rows.

    Returns:
        None, said in a line, where all scores are equal or some are not finite.
    """
    summary = RewardStatistics(figures["mean_score"], figures["score_std"], 2 * num_pairs, data)
    if summary.usable:
        return summary
    print_rank_0(
        f"no reward statistics are saved: over the evaluation set the scores have mean "
        f"{summary.mean:.4g} and spread {summary.std:.4g}; check the learning rate and the data"
    )
    return None
