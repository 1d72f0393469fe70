"""Numbers that are not finite end a run before weights change by them, with place and tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dschat.errors import UserError
from dschat.utils.distributed import all_gather, all_reduce_sum


def check_finite(value: float, place: str) -> None:
    """Stop the run at a value that is not finite: weights saved after it would be useless."""
    if not math.isfinite(value):
        raise _error(f"{place} is {value}")


@dataclass(frozen=True)
class Gradients:
    """Sums of this rank's gradients for one optimizer step, before ranks add up what they have.

    A sum is not finite where an element is not.

    Attributes:
        sums: names of parameters, and () fp32; the nearest to the loss first.
    """

    sums: Sequence[tuple[str, torch.Tensor]]

    @property
    def total(self) -> list[torch.Tensor]:
        """Their sum, to be read with other numbers of the step; [] where there are none."""
        return [torch.stack([value for _, value in self.sums]).sum()] if self.sums else []

    def broken(self) -> str | None:
        """Name the first that is not finite."""
        return next((name for name, value in self.sums if not torch.isfinite(value)), None)


class GradientWatch:
    """Sums up the gradient of each trained parameter as backward passes make it."""

    def __init__(self, module: nn.Module):
        self._sums: list[tuple[str, torch.Tensor]] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(functools.partial(self._note, name))

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        self._sums.append((name, gradient.detach().sum(dtype=torch.float32)))

    def taken(self) -> Gradients:
        """Return what has come since the last call."""
        sums, self._sums = self._sums, []
        return Gradients(sums)


def gradients_of(watch: GradientWatch | None) -> Gradients:
    """Return what has come since the last call; without a watch nothing."""
    return Gradients([]) if watch is None else watch.taken()


def finite_sum(
    loss: str, own: float, total: float, gradients: Gradients, count: float = 1.0
) -> float:
    """Sum a loss over ranks, before the optimizer step is made that it is of.

    Args:
        loss: its name with that of the step, for messages. own: this rank's sum of it. total: the
            sum of this rank's gradients. count: of the loss's terms, on all ranks.

    Raises:
        UserError: on every rank, where the loss or a gradient is not finite; names rank and tensor.
    """
    everyone, gradient = all_reduce_sum([own, total])
    value = everyone / count
    if math.isfinite(value) and math.isfinite(gradient):
        return everyone
    ranks = [*enumerate(all_gather((math.isfinite(own), gradients.broken())))]
    first = next(
        (f"the gradient of {name} on rank {rank}" for rank, (_, name) in ranks if name), ""
    )
    if math.isfinite(value):
        raise _error(f"{loss} is {value}, and {first or 'the sum of all gradients'} is not finite")
    whose = ", ".join(str(rank) for rank, (is_finite, _) in ranks if not is_finite)
    where = f" on rank {whose}" if whose else ""
    raise _error(f"{loss} is {value}{where}" + (f", and {first} is not finite" if first else ""))


def _error(found: str) -> UserError:
    return UserError(
        f"{found}: the run stops and its weights are not saved; give a lower learning rate, or "
        "look for weights or data that are not finite"
    )
