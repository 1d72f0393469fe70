"""What a block of code allocates, sends to other ranks and reads back, by torch's dispatcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {torch.ops.aten._local_scalar_dense.default}


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


class Recorder(TorchDispatchMode):
    """Counts, in this process, what runs inside its `with`.

    Attributes:
        allocations: (dtype, shape) of new tensors of `least` bytes or more, and their number.
        collectives: name of each collective, and (calls, bytes) of what it was given.
        reads: numbers that left a tensor one by one, as by `.item()`: on a GPU each is a wait.
    """

    def __init__(self, least: int = 2**20):
        super().__init__()
        self.least = least
        self.allocations: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.collectives: dict[str, tuple[int, int]] = {}
        self.reads = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if func in _READS:
            self.reads += 1
        elif func.namespace == "c10d":
            self._send(func, args)
        else:
            for tensor in _tensors(out):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.least and storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    key = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
                    self.allocations[key] += 1
        return out

    def _send(self, func: Callable, args: tuple) -> None:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        size = sum(t.nbytes for t in _tensors(args))
        calls, total = self.collectives.get(name, (0, 0))
        self.collectives[name] = calls + 1, total + size

    @property
    def bytes(self) -> int:
        """All bytes of `allocations`, freed ones included."""
        return sum(
            count * torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            for (dtype, shape), count in self.allocations.items()
        )
