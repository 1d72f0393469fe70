"""A preference loss on batches of pairs: its sum, what a run shows of it, its evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dschat.data.batches import PreferenceBatch
from dschat.functional.preferences import PairLogprobs, PreferenceLoss
from dschat.models.causal_lm import eval_mode
from dschat.train.means import Means
from dschat.train.pair_logprobs import mismatched_logprobs, pair_logprobs
from dschat.train.reference import Reference
from dschat.utils.distributed import all_reduce_sum

FALLEN = 0.3  # nats per token
RAISES = "apo_zero"  # raises the chosen answers' own probability


@dataclass(frozen=True)
class Objective:
    """A preference loss, its coefficients, and the reference that it compares with."""

    loss: PreferenceLoss
    coefficients: Mapping[str, float]
    reference: Reference

    def __call__(
        self, model: nn.Module, batch: PreferenceBatch, distance: float | None = None
    ) -> tuple[torch.Tensor, Means]:
        """Sum the losses of a batch's real pairs, and the figures of these pairs.

        Args:
            distance: what `distance` gave for the accumulation group that the batch is part of.
        """
        reference = self.reference.pairs(model, batch)  # before there is a graph of the policy
        policy = pair_logprobs(model, batch)
        tokens = batch.answer_mask[:, 1:].sum(-1).clamp(min=1).chunk(2)  # a filler has none
        pairs = PairLogprobs(*policy, *tokens, *(reference or ()))
        scores, coefficients = self.loss.scores(pairs), dict(self.coefficients)
        if distance is not None:
            coefficients["kl"] = distance
        losses = self.loss.loss(*scores, **coefficients)
        figures = _figures(pairs, scores, coefficients, losses, batch.real)
        return (losses * batch.real).sum(), figures

    @torch.no_grad()
    def distance(self, model: nn.Module, batches: Iterable[PreferenceBatch]) -> float | None:
        """KTO's z: the policy's mean ratio on mismatched answers, over all ranks, at least 0.

        None where the loss takes no such distance.
        """
        if not self.loss.needs_kl:
            return None
        total = count = 0.0
        with eval_mode(model):
            for batch in batches:
                ratios = mismatched_logprobs(model, batch) - self.reference.mismatched(model, batch)
                total += ratios[batch.real].sum().item()
                count += batch.real.sum().item()
        total, count = all_reduce_sum([total, count])
        return max(total / max(count, 1.0), 0.0)


@torch.no_grad()
def _figures(
    pairs: PairLogprobs,
    scores: tuple[torch.Tensor, torch.Tensor],
    coefficients: Mapping[str, float],
    losses: torch.Tensor,
    real: torch.Tensor,
) -> Means:
    """Sum up a batch's real pairs: by pair, and by token of each side."""
    chosen, rejected = (coefficients["beta"] * score for score in scores)
    margin, one = chosen - rejected, torch.ones_like(losses)
    terms = {
        "loss": (losses, one),
        "accuracy": ((margin > 0) + 0.5 * (margin == 0), one),
        "margin": (margin, one),
        "reward_chosen": (chosen, one),
        "reward_rejected": (rejected, one),
        "logprob_chosen": (pairs.chosen, one),
        "logprob_rejected": (pairs.rejected, one),
        "logprob_per_token_chosen": (pairs.chosen, pairs.chosen_tokens),
        "logprob_per_token_rejected": (pairs.rejected, pairs.rejected_tokens),
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        terms["drift_chosen"] = pairs.ref_chosen - pairs.chosen, pairs.chosen_tokens
        terms["drift_rejected"] = pairs.ref_rejected - pairs.rejected, pairs.rejected_tokens
    if "kl" in coefficients:
        terms["kl"] = coefficients["kl"] * one, one
    columns = torch.stack([part.double() for term in terms.values() for part in term])  # (2F, B)
    sums = columns[:, real].sum(-1).tolist()
    return Means(
        dict(zip(terms, sums[::2], strict=True)), dict(zip(terms, sums[1::2], strict=True))
    )


@torch.no_grad()
def evaluate_preferences(
    engine: nn.Module,
    loader: Iterable[PreferenceBatch],
    device: torch.device,
    objective: Objective,
) -> dict[str, float]:
    """Loss and figures over the evaluation set, all ranks.

    Of the implicit rewards, beta times the scores: accuracy (ties count as half right), margin, and
    those of both sides. Of the answers: log-probabilities, summed and per token, and drift, by how
    many nats a token is less likely than under the reference.
    """
    means = Means()
    with eval_mode(engine):
        distance = objective.distance(engine, (batch.to(device) for batch in loader))
        for batch in loader:
            means.add(objective(engine, batch.to(device), distance)[1])
    return means.over_ranks().values()


class FallWatch:
    """Tells once in a run when both sides' log-probabilities fall.

    Below the reference, or without one below the first figures.

    Args:
        loss: has its remedies.
    """

    per_rank = False

    def __init__(self, loss: PreferenceLoss) -> None:
        raises = "" if loss.name == RAISES else f"loss_type {RAISES}, which raises the chosen ones"
        *some, last = filter(None, ("a lower learning rate", loss.holds, raises))
        self._remedy = f"{', '.join(some)}{', or ' if some else ''}{last}"
        self.first: dict[str, float] = {}
        self.told = False

    def advice(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Return a line at the first figures that show the fall, else None."""
        sides = ("chosen", "rejected")
        if self.told:
            return None
        now = {side: figures[f"logprob_per_token_{side}"] for side in sides}
        self.first = self.first or now
        falls = {s: figures.get(f"drift_{s}", self.first[s] - now[s]) for s in sides}
        if min(falls.values()) < FALLEN:
            return None
        self.told = True
        return (
            f"the answers of both sides become less likely, the chosen by {falls['chosen']:.2f} "
            f"nats a token, the rejected by {falls['rejected']:.2f}: the policy leaves both for "
            f"text that nobody has compared; give {self._remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        """State: the first figures, and whether the advice was given."""
        return {"first": self.first, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.first, self.told = state["first"], state["told"]
