"""Optimizer steps of a run: how many its batches make, and the micro-batches of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TypeVar

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of a run; in step 3 iterations.

    Attributes:
        epoch_steps: of each epoch; they differ where lengths decide the batches. Empty where the
            rows are not counted.
        batches_per_step: micro-batches; in step 3 batches of prompts.
    """

    total_steps: int
    epoch_steps: tuple[int, ...]
    batches_per_step: int

    @classmethod
    def of(
        cls, batches: Sequence[int | None], batches_per_step: int, max_steps: int = 0
    ) -> StepPlan:
        """Plan the steps over a loader's batches of each epoch; 0 `max_steps` is no limit.

        Batches that are not counted (None) make epochs until `max_steps`.
        """
        counts = [count for count in batches if count is not None]
        if len(counts) < len(batches):
            return cls(max_steps, (), batches_per_step)
        steps = tuple(num_accumulation_groups(count, batches_per_step) for count in counts)
        total = sum(steps)
        return cls(min(total, max_steps) if max_steps else total, steps, batches_per_step)

    @property
    def epochs(self) -> int:
        """Epochs at most; the run ends after `total_steps` anyway."""
        return len(self.epoch_steps) or self.total_steps

    def is_evaluated_between(self, step: int, interval: int) -> bool:
        """Tell whether the interval asks for an evaluation that no end does: an epoch's, the run's.

        Args:
            interval: steps from one to the next; 0: none.
        """
        ends = {*accumulate(self.epoch_steps), self.total_steps}
        return interval > 0 and step % interval == 0 and step not in ends

    def batches_of(self, step: int, epoch: int) -> int:
        """Batches of this epoch that are used up after a step in it."""
        return (step - sum(self.epoch_steps[:epoch])) * self.batches_per_step


def accumulation_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step; an epoch's last group may be shorter."""
    iterator = iter(batches)
    while micro_batches := list(islice(iterator, size)):
        yield micro_batches


def with_next(groups: Iterable[Batch], is_wanted: bool) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each item with the one that follows; None at the end, and where it is not wanted."""
    iterator = iter(groups)
    if not is_wanted:
        yield from ((item, None) for item in iterator)
        return
    for item in islice(iterator, 1):
        for following in iterator:
            yield item, following
            item = following
        yield item, None


def num_accumulation_groups(num_batches: int, size: int) -> int:
    """Optimizer steps that `num_batches` micro-batches make."""
    return -(-num_batches // size)
