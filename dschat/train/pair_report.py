"""Report on a reward model over an evaluation set: accuracy, calibration, tables of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dschat.errors import UserError
from dschat.functional.proportions import (
    ReliabilityBin,
    calibration_error,
    reliability,
    wilson_interval,
)
from dschat.utils.printable import printable

# Bounds of the buckets, in tokens: how much longer the chosen answer is than the rejected one.
LENGTH_BOUNDS = (-128, -32, -8, 0, 1, 9, 33, 129)


@dataclass(frozen=True)
class ScoredPairs:
    """Scores and lengths of the pairs of a set, in its order, on every rank; all (N,) float64."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor  # of the answer, its end token included
    rejected_tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def margin(self) -> torch.Tensor:
        """Score of the chosen less that of the rejected answer."""
        return self.chosen - self.rejected

    @property
    def length_difference(self) -> torch.Tensor:
        """Tokens of the chosen less those of the rejected answer."""
        return self.chosen_tokens - self.rejected_tokens

    def of(self, where: torch.Tensor) -> ScoredPairs:
        """The pairs where a (N,) bool mask is True."""
        return ScoredPairs(*(part[where] for part in vars(self).values()))

    def reliability(self) -> list[ReliabilityBin]:
        """Bins of sigmoid(|margin|), the probability of the answer that the model prefers."""
        return reliability(self.margin.abs().sigmoid(), half_ties(self.margin))

    def figures(self) -> dict[str, float]:
        """Loss, accuracy with its interval, margin, calibration, mean and spread of the scores.

        Ties count as half right. Confidence is the mean of sigmoid(|margin|), the probability that
        the model gives to the answer it prefers: a calibrated model's equals its accuracy.
        """
        margin, right = self.margin, half_ties(self.margin)
        low, high = wilson_interval(right.sum().item(), len(self))
        scores = torch.cat([self.chosen, self.rejected])  # (2N,)
        return {
            "loss": -F.logsigmoid(margin).mean().item(),
            "accuracy": right.mean().item(),
            "accuracy_low": low,
            "accuracy_high": high,
            "margin": margin.mean().item(),
            "confidence": margin.abs().sigmoid().mean().item(),
            "ece": calibration_error(self.reliability()),
            "mean_score": scores.mean().item(),
            "score_std": scores.std(correction=0).item(),
        }


def half_ties(difference: torch.Tensor) -> torch.Tensor:
    """Return 1 where a difference is positive, 0.5 where it is 0, else 0; float64."""
    return (difference > 0).double() + 0.5 * (difference == 0).double()


@dataclass(frozen=True)
class Part:
    """Figures of some of the pairs, beside those of a judge that reads nothing but lengths.

    Attributes:
        accuracy_low, accuracy_high: Wilson's interval, 95 %.
        length_only: accuracy of taking the longer answer for the better one.
        length_agreement: share of pairs in which the model prefers the longer answer.
    """

    name: str
    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    margin: float
    length_only: float
    length_agreement: float

    @classmethod
    def of(cls, name: str, scored: ScoredPairs) -> Part:
        """Sum up these pairs; a pair of equal lengths, or of equal scores, counts as half."""
        right, difference = half_ties(scored.margin).sum().item(), scored.length_difference
        return cls(
            name,
            len(scored),
            right / len(scored),
            *wilson_interval(right, len(scored)),
            margin=scored.margin.mean().item(),
            length_only=half_ties(difference).mean().item(),
            length_agreement=half_ties(scored.margin * difference).mean().item(),
        )


@dataclass(frozen=True)
class PairReport:
    """All that an evaluation says; `evaluation.json` holds it."""

    figures: dict[str, float]
    whole: Part
    length_difference: list[Part]
    sources: list[Part]
    subsets: list[Part]
    reliability: list[ReliabilityBin]

    @classmethod
    def of(
        cls,
        scored: ScoredPairs,
        sources: Sequence[str] | None = None,
        subsets: Sequence[str | None] | None = None,
    ) -> PairReport:
        """Sum up a set.

        Args:
            sources, subsets: names by pair; tables of one name alone, or of none, are left out.

        Raises:
            UserError: scores that are not finite.
        """
        broken = int((~torch.isfinite(scored.chosen + scored.rejected)).sum())
        if broken:
            raise UserError(
                f"reward model: {broken} of {len(scored)} pairs have scores that are not finite; "
                "look at its weights, or give dtype fp32"
            )
        return cls(
            {"pairs": len(scored), **scored.figures()},
            Part.of("all", scored),
            list(_by_length(scored)),
            list(_by_name(scored, sources)),
            list(_by_name(scored, subsets)),
            scored.reliability(),
        )

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        figures, tables = self.figures, []
        for title, parts in (
            ("source", self.sources),
            ("subset", self.subsets),
            ("chosen longer", self.length_difference),
        ):
            if parts:
                tables += _table(title, [*parts, self.whole])
        head = (
            f"accuracy {figures['accuracy']:.3f}, 95 % interval {figures['accuracy_low']:.3f} to "
            f"{figures['accuracy_high']:.3f}, of {figures['pairs']} pairs; calibration error "
            f"{figures['ece']:.3f}; taking the longer answer: {self.whole.length_only:.3f}"
        )
        return [head, *tables, *self._length_bias()]

    def _length_bias(self) -> Iterable[str]:
        """Describe where the model prefers long answers, or short ones, more often than people did.

        Beyond both intervals, and more often than not: a model that knows nothing of a set takes
        half of its longer answers.
        """
        count, model, people = (
            self.whole.pairs,
            self.whole.length_agreement,
            self.whole.length_only,
        )
        side, length = (1, "longer") if model > people else (-1, "shorter")
        mine = min(side * bound for bound in wilson_interval(model * count, count))
        theirs = max(side * bound for bound in wilson_interval(people * count, count))
        if mine > max(theirs, side * 0.5):
            model, people = (x if side > 0 else 1 - x for x in (model, people))
            yield (
                f"advice: the model prefers the {length} answer in {model:.1%} of the pairs, the "
                f"data does in {people:.1%}: its scores follow length beyond what it was shown"
            )

    def text(self, settings: Mapping[str, Any]) -> str:
        """Write the report as JSON, with the flags that repeat it."""
        return json.dumps({**asdict(self), "settings": dict(settings)}, indent=1) + "\n"


def _by_length(scored: ScoredPairs) -> Iterable[Part]:
    """Parts by how much longer the chosen answer is; those without pairs are left out."""
    bounds = torch.tensor(LENGTH_BOUNDS, dtype=torch.float64)
    places = torch.bucketize(scored.length_difference, bounds, right=True)  # (N,)
    for number in places.unique().tolist():
        low = LENGTH_BOUNDS[number - 1] if number else None
        high = LENGTH_BOUNDS[number] - 1 if number < len(LENGTH_BOUNDS) else None
        yield Part.of(_range(low, high), scored.of(places == number))


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return f"{high:+} or less" if low is None else f"{low:+} or more"
    return f"{low:+}" if low == high else f"{low:+} to {high:+}"


def _by_name(scored: ScoredPairs, names: Sequence[str | None] | None) -> Iterable[Part]:
    """Parts by name, in alphabetical order; pairs without a name are in none."""
    known = sorted({name for name in names or () if name is not None})
    if names is None or (len(known) < 2 and None not in names):
        return
    for name in known:
        where = torch.tensor([name == other for other in names], dtype=torch.bool)
        yield Part.of(name, scored.of(where))


def _table(title: str, parts: Sequence[Part]) -> list[str]:
    names = [printable(part.name, keep="") for part in parts]
    width = max(len(title), *map(len, names))
    head = f"{title:{width}}   pairs  accuracy        interval   margin  longer wins  agrees"
    lines = ["", head]
    for name, part in zip(names, parts, strict=True):
        interval = f"{part.accuracy_low:.3f} to {part.accuracy_high:.3f}"
        lines.append(
            f"{name:{width}}  {part.pairs:6}  {part.accuracy:8.3f}  {interval}  "
            f"{part.margin:7.3f}  {part.length_only:11.3f}  {part.length_agreement:6.3f}"
        )
    return lines
