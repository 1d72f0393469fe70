"""Advantage estimators: what each answer token is worth, by a critic or by other answers.

A new one is a function of the kind `Estimator.advantages` and an entry of `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from dschat.functional.returns import (
    generalized_advantages,
    group_centred,
    group_normalised,
    leave_one_out,
)
from dschat.lazy import torch
from dschat.rlhf.experience import Experience, filled

# Experiences of one iteration, their (B, A) rewards, gamma, lambda -> the same with advantages.
Advantages = Callable[
    [list[Experience], list["torch.Tensor"], float, float],
    list[Experience],
]
# (N,) rewards of entire answers, (N,) groups, (N,) bool of rows that count -> (N,) advantages.
Comparison = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Estimator:
    """One way to estimate advantages, and what the rest of PPO has to know of it.

    Attributes:
        advantages: adds `advantages`, and under a critic `returns`, to the experiences.
        needs_critic: values are learned; gamma, lambda and the critic's settings have a meaning.
        kl_in_loss: the KL penalty is k3 in the policy's loss, not a part of the reward.
        whitens: `whiten_advantages auto` whitens over the batch.
        is_normalised: advantages are in deviations of their group already; never whitened.
            `advantage_std` chooses which (`measured`).
        min_answers: answers to one prompt that it needs.
    """

    name: str
    advantages: Advantages
    needs_critic: bool = False
    kl_in_loss: bool = False
    whitens: bool = False
    is_normalised: bool = False
    min_answers: int = 2

    def measured(self, deviation: str) -> Estimator:
        """Return the estimator with another of `DEVIATIONS` as divisor, where it has one."""
        if not self.is_normalised:
            return self
        normalises = deviation != "none"
        return replace(self, advantages=compared(DEVIATIONS[deviation]), is_normalised=normalises)


def gae(
    experiences: list[Experience], rewards: list[torch.Tensor], gamma: float, lam: float
) -> list[Experience]:
    """Generalized advantage estimation inside each answer, with returns for the critic."""
    learned = [
        generalized_advantages(r, filled(e.values), e.answer_mask, gamma, lam)
        for r, e in zip(rewards, experiences, strict=True)
    ]
    return [e.with_returns(*pair) for e, pair in zip(experiences, learned, strict=True)]


def compared(compare: Comparison) -> Advantages:
    """Make an estimator that compares entire answers: one number for all tokens of an answer.

    A group's answers may be spread over the experiences, not over the ranks. Answers without a
    reward are compared with nothing, and one that is left alone by them is worth 0.
    """

    def advantages(
        experiences: list[Experience], rewards: list[torch.Tensor], gamma: float, lam: float
    ) -> list[Experience]:
        group = torch.cat([e.group for e in experiences])
        real = torch.cat([e.real for e in experiences])
        counted = torch.cat([e.counted for e in experiences])
        is_left_alone = (_sizes(group, counted) == 1) & (_sizes(group, real) > 1)
        totals = torch.cat([r.sum(-1) for r in rewards])
        numbers = compare(totals, group, counted & ~is_left_alone)
        parts = numbers.split([len(e) for e in experiences])
        return [
            e.with_returns(part.unsqueeze(-1) * e.answer_mask)
            for e, part in zip(experiences, parts, strict=True)
        ]

    return advantages


def _sizes(group: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(N,): how many rows that count each row's group has."""
    _, index = group.unique(return_inverse=True)
    return torch.bincount(index, weights=counted.double())[index]


# By the setting `advantage_std`: what the distance from a group's mean is divided by.
DEVIATIONS: dict[str, Comparison] = {
    "population": group_normalised,
    "sample": partial(group_normalised, correction=1),
    "none": group_centred,
}
_ALL = (
    Estimator("gae", gae, needs_critic=True, whitens=True, min_answers=1),
    Estimator("rloo", compared(leave_one_out)),
    Estimator("grpo", compared(group_normalised), kl_in_loss=True, is_normalised=True),
)
ESTIMATORS = {estimator.name: estimator for estimator in _ALL}
