"""Keys and values of answers that grow side by side, written in place.

Row n of the cache holds one text in the columns [first, column]: a prompt is stored after its left
padding from column 0 on, each token after it in the next column. Rows are at columns of their own,
so that one that has ended makes room for another prompt while the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

BLOCK = 64  # columns by which it grows


@dataclass
class Place:
    """Where the next states go; the layers share it.

    Attributes:
        rows: (n,) rows that get prompts, or None while tokens are decoded.
        source: (n,) for each of these rows, its prompt in the batch.
        columns: (N,) where each row's token goes. width: columns that attention sees.
    """

    rows: torch.Tensor | None = None
    source: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    width: Any = 0  # an int; while a step is recorded, a number that it depends on


class StaticLayer(CacheLayerMixin):
    """One layer: `keys` and `values` are (N, heads, C, D), of heads' own sizes."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, place: Place, rows: int, window: int | None):
        super().__init__()
        self.place, self.rows, self.window = place, rows, window
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window  # what transformers makes a prompt's mask from

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate no column yet: `StaticCache.reserve` knows how many there will be."""
        self.keys, self.values = (
            x.new_zeros(self.rows, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store prompts (B, heads, P, D) or one token of each row; return what attention sees."""
        place, new = self.place, (key_states, value_states)
        if place.rows is not None:
            if not self.is_initialized:
                self.lazy_initialization(*new)
            self.reserve(key_states.shape[2])
            for held, states in zip((self.keys, self.values), new, strict=True):
                held[place.rows, :, : states.shape[2]] = states[place.source]
            return new
        assert place.columns is not None
        index = torch.arange(place.columns.shape[0], device=place.columns.device)
        for held, states in zip((self.keys, self.values), new, strict=True):
            # Indices of rows and columns around a slice: the result is (N, heads, D).
            held[index, :, place.columns] = states[:, :, 0]
        return self.keys[:, :, : place.width], self.values[:, :, : place.width]

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        missing = columns - self.keys.shape[2]
        if missing > 0:  # zeros: what is masked is multiplied by 0, which a NaN would survive
            self.keys = F.pad(self.keys, (0, 0, 0, missing))
            self.values = F.pad(self.values, (0, 0, 0, missing))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows alone."""
        self.keys, self.values, self.rows = self.keys[rows], self.values[rows], len(rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Prompts see themselves alone; a step of decoding brings its masks along."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing stands before a prompt."""
        return 0

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1


@dataclass
class StaticCache(Cache):
    """The cache of all layers, of full or sliding attention.

    Attributes:
        windows: of each layer; None: full attention.
    """

    windows: Sequence[int | None]
    rows: int
    place: Place = field(default_factory=Place)

    def __post_init__(self) -> None:
        self.states = [StaticLayer(self.place, self.rows, window) for window in self.windows]
        super().__init__(layers=[*self.states])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of each layer in turn."""
        return [x for layer in self.states for x in (layer.keys, layer.values)]

    @tensors.setter
    def tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        for layer, keys, values in zip(self.states, tensors[::2], tensors[1::2], strict=True):
            layer.keys, layer.values = keys, values

    @property
    def columns(self) -> int:
        """Number of columns that there are."""
        return self.states[0].keys.shape[2]

    def reserve(self, columns: int, limit: int) -> None:
        """Make room for so many columns, and in blocks for more, up to `limit`."""
        if columns > self.columns:
            wanted = min(-(-columns // BLOCK) * BLOCK, max(limit, columns))
            for layer in self.states:
                layer.reserve(wanted)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""
        self.rows = len(rows)
        for layer in self.states:
            layer.keep(rows)


def windows_of(config: PretrainedConfig) -> list[int | None] | None:
    """Return the window of each layer's attention; None where a layer keeps other states.

    A window of w sees the token itself and w - 1 before it.
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            return None
    return windows or None
