"""Tensors on their way between host and device: batches ahead of time, numbers in one piece.

On a GPU every number that is read alone waits for all that was launched before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from dschat.data.batches import BatchT


def ahead(
    groups: Iterable[list[BatchT]], device: torch.device
) -> Iterator[tuple[list[BatchT], list[BatchT]]]:
    """Yield each accumulation group as collated, to be counted, and on the device.

    A group is collated and on its way while the one before it is computed.
    """
    waiting: tuple[list[BatchT], list[BatchT]] | None = None
    for group in groups:
        following = group, [batch.to(device) for batch in group]
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting


def numbers(values: Sequence[torch.Tensor]) -> list[float]:
    """Read scalars of any dtype in one transfer; exact up to 2**53."""
    return torch.stack([value.detach().double() for value in values]).tolist() if values else []


def read_sums(parts: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Read the scalars of all mappings in one transfer."""
    found = iter(numbers([value for part in parts for value in part.values()]))
    return [{name: next(found) for name in part} for part in parts]
