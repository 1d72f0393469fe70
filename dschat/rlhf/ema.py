"""Exponential moving average of the actor's weights, sharded as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from dschat.utils.zero import (
    full_shape,
    is_partitioned,
    local_shard,
    own_part,
    set_local_shard,
)


class EMA:
    """Exponential moving average of the trainable parameters, fp32, on the CPU.

    Every rank averages its own shards, so an update under ZeRO-3 gathers nothing.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self._parameters = dict(module.named_parameters())
        # Under ZeRO-3 each rank averages shards of its own; otherwise all hold the same.
        self.per_rank = any(is_partitioned(p) for p in module.parameters())
        self.shadow = {
            name: local_shard(p).detach().float().cpu().clone()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * parameter; call after a real optimizer step."""
        parameters = dict(self.module.named_parameters())
        for name, average in self.shadow.items():
            current = local_shard(parameters[name]).detach().to("cpu", torch.float32)
            average.lerp_(current, 1.0 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Averages by parameter name."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore averages, complete or this rank's shards, of the same parameters."""
        state = {name: self._own(name, average) for name, average in state.items()}
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self.shadow.items()}:
            raise RuntimeError("the saved moving average is not of this actor's parameters")
        for name, average in state.items():
            self.shadow[name].copy_(average)

    def _own(self, name: str, average: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters.get(name)
        if parameter is None or not is_partitioned(parameter):
            return average
        is_whole = average.shape == full_shape(parameter)
        return own_part(parameter, average) if is_whole else average

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Use the averaged weights inside the block, then the own ones again, bit for bit."""
        parameters = dict(self.module.named_parameters())
        own = {n: local_shard(parameters[n]).detach().clone() for n in self.shadow}
        for name, average in self.shadow.items():
            set_local_shard(parameters[name], average)
        try:
            yield self.module
        finally:
            for name, shard in own.items():
                set_local_shard(parameters[name], shard)
