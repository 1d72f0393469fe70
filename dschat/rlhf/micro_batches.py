"""Micro-batches of an iteration: the rows of a rollout that one pass of a model is over.

Scoring passes are made over the micro-batches of the first epoch's training passes, each as narrow
as its own longest prompt and answer: what is computed before an update and in it has one shape, and
so one rounding, in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dschat.lazy import torch


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one rollout, and the widths that they need."""

    index: torch.Tensor  # (b,) int64, on the host
    prompt: int  # tokens of its longest prompt
    answer: int  # tokens of its longest answer


@dataclass(frozen=True)
class RowLengths:
    """What dealing a rollout's rows needs to know of them; on the host."""

    prompt: torch.Tensor  # (B,) int64 tokens
    answer: torch.Tensor  # (B,) int64 tokens, the end token included
    real: torch.Tensor  # (B,) bool: False for rows that only fill the batch

    @classmethod
    def of(cls, attention_mask: torch.Tensor, prompt: int, real: torch.Tensor) -> RowLengths:
        """Read the lengths off a (B, prompt + A) mask, in one transfer from the device."""
        sides = attention_mask[:, :prompt].sum(-1), attention_mask[:, prompt:].sum(-1)
        columns = torch.stack([*sides, real.long()]).cpu()
        return cls(columns[0], columns[1], columns[2].bool())

    def micro_batch(self, index: torch.Tensor) -> MicroBatch:
        """Make a micro-batch of these rows."""
        return MicroBatch(index, int(self.prompt[index].max()), int(self.answer[index].max()))

    def longest_first(self, index: torch.Tensor) -> torch.Tensor:
        """Sort rows by their tokens; equally long ones keep their order."""
        tokens = (self.prompt + self.answer)[index]
        return index[tokens.argsort(descending=True, stable=True)]


def by_length(rows: RowLengths, size: int) -> list[MicroBatch]:
    """Deal all rows to micro-batches of `size` rows of like length, the longest first."""
    order = rows.longest_first(torch.arange(len(rows.real)))
    return [rows.micro_batch(index) for index in order.split(size)]


def in_turn(rollouts: Sequence[RowLengths]) -> list[int]:
    """Numbers of the rollouts in the order in which they are trained on, by their real rows.

    One that is short of real rows begins a group, which the next one then fills up.
    """
    return sorted(range(len(rollouts)), key=lambda n: int(rollouts[n].real.sum()))


def dealt(
    rollouts: Sequence[RowLengths], size: int, accumulated: int, generator: torch.Generator
) -> list[list[MicroBatch]]:
    """Deal every row once, shuffled, to micro-batches of `size` rows of one rollout each.

    Filler rows are kept together, and real ones are spread evenly over the accumulation groups (of
    `accumulated` micro-batches) that they need: no optimizer step is made of a few rows left over.
    Micro-batches have the same sizes on every rank, whatever its share of real rows. Which rows a
    group has does not depend on their lengths; within it they are sorted by them.

    Returns:
        The micro-batches of each rollout; steps take the rollouts `in_turn`.
    """
    found: list[list[MicroBatch]] = [[] for _ in rollouts]
    made = 0
    for number in in_turn(rollouts):
        rows = rollouts[number]
        order = torch.randperm(len(rows.real), generator=generator)
        is_real = rows.real[order]
        if not is_real.all():
            order = _spread(
                torch.cat([order[is_real], order[~is_real]]), is_real, size * accumulated
            )
        for group in _groups(order, size, accumulated, made % accumulated):
            chunks = rows.longest_first(group).split(size)
            found[number] += [rows.micro_batch(index) for index in chunks]
            made += len(chunks)
    return found


def _groups(
    order: torch.Tensor, size: int, accumulated: int, filled: int
) -> Iterator[torch.Tensor]:
    """Split rows at the ends of accumulation groups, the first of which has `filled` already."""
    first = (accumulated - filled) * size
    yield order[:first]
    if len(order) > first:
        yield from order[first:].split(size * accumulated)


def _spread(order: torch.Tensor, is_real: torch.Tensor, group_rows: int) -> torch.Tensor:
    """Deal rows to groups of `group_rows` places, one to each in turn; real rows come first."""
    place = torch.arange(len(order))
    group, turn = place // group_rows, place % group_rows
    needed = -(-int(is_real.sum()) // group_rows)  # groups; those after them get filler rows alone
    turn = torch.where(group < needed, turn * needed + group, len(order) + place)
    spread = torch.empty_like(order)
    spread[turn.argsort()] = order
    return spread
