"""Length of a run in optimizer steps, and what to say at the start of one that is too short."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

FEW_STEPS = 20  # by then Adam's averages and the schedule have hardly started
LONGEST_WARM_UP, USUAL_WARM_UP = 1 / 3, 1 / 10  # of a run


@dataclass(frozen=True)
class RunLength:
    """The numbers that decide how many optimizer steps a model makes.

    Attributes:
        epochs: passes over the data.
        micro_batches: of an epoch; None where the rows are not counted.
        accumulation: micro-batches of an optimizer step.
        warm_up: optimizer steps in which the learning rate rises.
        max_steps: limit of the run in units; 0: the data end it.
        unit: optimizer steps of a unit; 1 but in step 3, which counts iterations.
        waiting: optimizer steps at the start in which this model does not train.
        steps_of_epoch: from accumulation to the optimizer steps of an epoch; None: the quotient.
    """

    epochs: int
    micro_batches: int | None
    accumulation: int
    warm_up: int
    max_steps: int = 0
    unit: int = 1
    waiting: int = 0
    steps_of_epoch: Callable[[int], int] | None = None

    @property
    def steps_of_data(self) -> float:
        """Optimizer steps that the data would make."""
        if self.micro_batches is None:
            return math.inf
        if self.steps_of_epoch is not None:
            return self.epochs * self.steps_of_epoch(self.accumulation)
        return self.epochs * math.ceil(self.micro_batches / self.accumulation)

    @property
    def is_limited(self) -> bool:
        """Return whether max_steps ends the run before the data."""
        return 0 < self.max_steps * self.unit < self.steps_of_data

    @property
    def steps(self) -> int:
        """Optimizer steps of the entire run."""
        steps = self.max_steps * self.unit if self.is_limited else self.steps_of_data
        return max(int(steps) - self.waiting, 1)

    @property
    def has_long_warm_up(self) -> bool:
        """Return whether too little of the run is left after the warm-up."""
        return self.warm_up > LONGEST_WARM_UP * self.steps

    def with_more_steps(self, least: int = FEW_STEPS) -> RunLength:
        """Lower the accumulation until there are `least` optimizer steps."""
        if self.micro_batches is None or self.is_limited:
            return self
        most = min(self.accumulation, self.micro_batches)
        lowered = [replace(self, accumulation=n) for n in range(most, 0, -1)]
        return next((run for run in lowered if run.steps >= least), lowered[-1])

    def with_more_epochs(self, least: int = FEW_STEPS, most: float = math.inf) -> RunLength:
        """Raise the epochs, to `most`, until there are `least` optimizer steps."""
        if self.micro_batches is None or self.is_limited or self.steps >= least:
            return self
        needed = math.ceil(least * self.epochs / self.steps)
        return replace(self, epochs=max(self.epochs, int(min(needed, most))))

    def with_shorter_warm_up(self) -> RunLength:
        """Lower a long warm-up to a tenth of the run."""
        if not self.has_long_warm_up:
            return self
        return replace(self, warm_up=int(USUAL_WARM_UP * self.steps))

    def advice(self) -> list[str]:
        """Write a line for each thing that is out of proportion, with the value that would do."""
        lines, fitting = [], self.with_more_steps()
        if self.micro_batches is not None and self.accumulation > self.micro_batches:
            lines.append(
                f"gradient_accumulation_steps {self.accumulation}: an epoch has "
                f"{self.micro_batches} micro-batches; give {fitting.accumulation}"
            )
        if self.steps < FEW_STEPS:
            lines.append(
                f"optimizer steps in all: {self.steps}, too few to learn much from; "
                f"give {self._longer(fitting)}"
            )
        if self.has_long_warm_up:
            warm_up = fitting.with_shorter_warm_up().warm_up
            if warm_up == self.warm_up:  # of more steps it would be no third
                warm_up = self.with_shorter_warm_up().warm_up
            lines.append(
                f"num_warmup_steps {self.warm_up}: more than a third of the run's {self.steps} "
                f"optimizer steps, so it is hardly at its learning rate; "
                f"give {warm_up}"
            )
        return [f"advice: {line}" for line in lines]

    def _longer(self, fitting: RunLength) -> str:
        """Settings that make `FEW_STEPS`."""
        if self.is_limited:
            return f"max_steps {math.ceil(FEW_STEPS / self.unit)}"
        parts = []
        if fitting.accumulation < self.accumulation:
            parts.append(f"gradient_accumulation_steps {fitting.accumulation}")
        if fitting.steps < FEW_STEPS:
            parts.append(f"num_train_epochs {fitting.with_more_epochs().epochs}")
        return " and ".join(parts)
