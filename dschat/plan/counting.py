"""Bytes that operations allocate: real tensors or fake ones, counted alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations make inside the block, while they live.

    Views share their storage and count once; what is there already counts as nothing. An operation
    is one of PyTorch's dispatcher: the workspace of its kernel is not seen.

    Args:
        kind: names what a new tensor is; called once a storage.

    Attributes:
        live, peak: bytes now, and the most that lived at a time.
        at_peak: bytes by kind at that time.
    """

    def __init__(
        self,
        existing: Iterable[torch.Tensor] = (),
        kind: Callable[[torch.Tensor], str] = lambda tensor: "activations",
    ):
        super().__init__()
        self.kind = kind
        self.live, self.peak = 0, 0
        self.by_kind: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._known = {t.untyped_storage()._cdata for t in existing}
        self._alive: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def start_again(self) -> None:
        """Measure the peak from now on."""
        self.peak, self.at_peak = self.live, dict(self.by_kind)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive or tensor.device.type == "meta":
            return
        size, kind = storage.nbytes(), self.kind(tensor)
        gone = weakref.ref(storage, lambda _, key=key: self._drop(key))  # type: ignore[misc]
        self._alive[key] = (gone, kind, size)
        self.live += size
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.by_kind)

    def _drop(self, key: int) -> None:
        if key in self._alive:
            _, kind, size = self._alive.pop(key)
            self.live -= size
            self.by_kind[kind] -= size
