"""Losses and scores of one batch in steps 1 and 2, and figures of an entire evaluation set.

Evaluation covers the set once on any number of ranks, weighted by tokens or pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import datasets
import torch
from torch import nn

from dschat.data.batches import (
    Batch,
    PackedBatch,
    PairBatch,
    PreferenceBatch,
    SFTBatch,
    SharedPromptBatch,
)
from dschat.data.report import DataReport
from dschat.models.causal_lm import eval_mode
from dschat.models.logprobs import target_loss
from dschat.models.packing import packed_inputs
from dschat.models.reward_model import scores_at_end
from dschat.models.reward_statistics import RewardStatistics
from dschat.models.right_padding import needed_mask, right_padded_inputs
from dschat.train.pair_report import PairReport, ScoredPairs
from dschat.utils.distributed import all_reduce_sum, print_rank_0

BatchT = TypeVar("BatchT", bound=Batch)


def answer_loss(model: nn.Module, batch: SFTBatch) -> torch.Tensor:
    """Sum of the loss over a batch's trained tokens."""
    if isinstance(batch, PackedBatch):
        inputs = packed_inputs(model, batch.input_ids, batch.position_ids)
    else:
        inputs = right_padded_inputs(model, batch.input_ids, batch.attention_mask)
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


def pair_scores(
    model: nn.Module, batch: PairBatch | SharedPromptBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) scores of the chosen and (B,) of the rejected answers."""
    if isinstance(batch, SharedPromptBatch):
        values = model(batch.input_ids, segments=batch.segments, position_ids=batch.position_ids)
        chosen, rejected = values.gather(-1, batch.ends).unbind(-1)
        return chosen, rejected
    mask = needed_mask(model, batch.input_ids, batch.attention_mask)
    values = model(batch.input_ids, mask)
    chosen, rejected = scores_at_end(values, batch.attention_mask).chunk(2)
    return chosen, rejected


def pair_count(batch: PairBatch | SharedPromptBatch) -> torch.Tensor:
    """Count the pairs of a batch that the loss runs over."""
    return batch.real.sum()


@torch.no_grad()
def score_pairs(
    engine: nn.Module, loader: Iterable[PreferenceBatch], device: torch.device
) -> ScoredPairs:
    """Score the pairs of an evaluation set once, on all ranks together, in the set's order."""
    rows: list[torch.Tensor] = []  # each (B, 5) float64: its place, two scores, two lengths
    with eval_mode(engine):
        for batch in loader:
            batch = batch.to(device)
            parts = (batch.numbers, *pair_scores(engine, batch), *answer_tokens(batch))
            rows.append(torch.stack([part.double() for part in parts], -1)[batch.real].cpu())
    mine = torch.cat(rows) if rows else torch.zeros(0, 5, dtype=torch.float64)
    (count,) = all_reduce_sum([len(mine)])
    scored = torch.zeros(int(count), 4, dtype=torch.float64)
    scored[mine[:, 0].long()] = mine[:, 1:]
    everything = torch.tensor(all_reduce_sum(scored.flatten().tolist()), dtype=torch.float64)
    return ScoredPairs(*everything.view(-1, 4).unbind(-1))


def answer_tokens(batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) tokens of the chosen and (B,) of the rejected answers, their end tokens included."""
    chosen, rejected = batch.answer_mask.sum(-1).chunk(2)
    return chosen, rejected


def evaluate_pairs(
    engine: nn.Module, loader: Iterable[PreferenceBatch], device: torch.device
) -> dict[str, float]:
    """Figures over the evaluation set (`ScoredPairs.figures`), all ranks."""
    return score_pairs(engine, loader, device).figures()


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


def report_pairs(scored: ScoredPairs, rows: datasets.Dataset, counts: DataReport) -> PairReport:
    """Report on scored pairs, by source and by subset, and print its tables.

    Args:
        rows: the set, in whose order the pairs are. counts: its report, which names the sources.

    Raises:
        UserError: scores that are not finite.
    """
    names = list(dict.fromkeys(source.name for source in counts.sources))
    has_source = "source" in rows.column_names
    sources = [names[number] for number in rows["source"]] if has_source else None
    report = PairReport.of(scored, sources, list(rows["subset"]))
    print_rank_0("\n".join(report.lines()))
    return report


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
