"""Learning-rate schedules: one factor for every group, whose own rates stay apart."""

from __future__ import annotations

import math
from collections.abc import Callable

from dschat.errors import UserError
from dschat.lazy import torch

Schedule = Callable[["torch.optim.Optimizer"], "torch.optim.lr_scheduler.LRScheduler"]

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
POLYNOMIAL_END = 1e-7  # a rate, as transformers has it


def schedule_factory(name: str, num_warmup_steps: int, num_training_steps: int) -> Schedule:
    """Make a function that builds the schedule; DeepSpeed calls it on the groups that survive.

    Steps are optimizer steps. Every group keeps its own rate times one common factor. The names
    and shapes are those of `transformers.get_scheduler`, up to rounding, without its import;
    restarts are one cycle, the polynomial is of degree 1.
    """
    if name not in SCHEDULES:
        raise UserError(f"lr_scheduler_type is {name!r}: choose one of {', '.join(SCHEDULES)}")
    decay_steps = max(num_training_steps - num_warmup_steps, 1)

    def build(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        end = POLYNOMIAL_END / optimizer.defaults["lr"] if name == "polynomial" else 0.0

        def factor(step: int) -> float:
            if name == "constant":
                return 1.0
            if step < num_warmup_steps:
                return step / num_warmup_steps
            if name == "constant_with_warmup":
                return 1.0
            left = 1.0 - min((step - num_warmup_steps) / decay_steps, 1.0)
            if name.startswith("cosine"):
                return 0.5 * (1.0 - math.cos(math.pi * left))
            return end + (1.0 - end) * left

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    return build
