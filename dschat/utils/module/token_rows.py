"""Trainable rows of single tokens, in the frozen input embedding and the frozen output head.

Adapters leave both tables as they are, and no hidden state tells a row that was never trained from
the others like it. A table with `TokenRows` adds a trained difference to the rows of some tokens,
of rows x width parameters; no gradient of a table exists. Tied tables share one parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from dschat.utils.zero import full_shape, gathered, memory_of

ROWS_NAME = "lora_token_rows"  # begins like the leaf names of adapters, to which it belongs


class TokenRows(nn.Module):
    """Base of the two tables, which keep `weight` under the name that it has in the model.

    Attributes:
        tokens: (k,) ids, ascending. lora_token_rows: (k, width), added to their rows; starts at 0.
        base: the module in whose place it stands, on the same weight.
    """

    weight: torch.Tensor
    tokens: torch.Tensor
    lora_token_rows: nn.Parameter
    adapter_enabled: bool

    def _take_place_of(self, base: nn.Module, tokens: torch.Tensor, rows: nn.Parameter) -> None:
        self.weight = cast(nn.Parameter, base.weight)
        self.register_buffer("tokens", tokens, persistent=False)
        self.lora_token_rows = rows
        self.adapter_enabled = True
        self._base = (base,)  # in a tuple, so that it is no submodule
        self.train(base.training)

    @property
    def base(self) -> nn.Module:
        """The replaced module."""
        return self._base[0]

    def extra_repr(self) -> str:
        """Name the tokens for `print(model)`."""
        return f"{super().extra_repr()}, tokens={self.tokens.tolist()}"


class TokenRowsEmbedding(TokenRows, nn.Embedding):
    """An embedding of whose table some rows train."""

    def __init__(self, base: nn.Embedding, tokens: torch.Tensor, rows: nn.Parameter):
        vocabulary, width = full_shape(base.weight)
        with torch.device("meta"):
            nn.Embedding.__init__(self, vocabulary, width, base.padding_idx)
        self._take_place_of(base, tokens, rows)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., width)."""
        y = self.base.forward(input)
        if not self.adapter_enabled:
            return y
        place = torch.searchsorted(self.tokens, input.contiguous()).clamp(max=len(self.tokens) - 1)
        place = place.where(self.tokens[place] == input, len(self.tokens))
        added = F.embedding(place, F.pad(self.lora_token_rows, (0, 0, 0, 1)))  # 0 for all others
        scale = getattr(self.base, "embed_scale", None)  # that the base multiplies its rows by
        if isinstance(scale, torch.Tensor):
            scale = scale.to(y)
        return y + (added if scale is None else added * scale)


class TokenRowsHead(TokenRows, nn.Linear):
    """An output head of whose weight some rows train."""

    def __init__(self, base: nn.Linear, tokens: torch.Tensor, rows: nn.Parameter):
        vocabulary, width = full_shape(base.weight)
        with torch.device("meta"):
            nn.Linear.__init__(self, width, vocabulary, bias=False)
        self._take_place_of(base, tokens, rows)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., vocabulary)."""
        y = self.base.forward(input)
        if not self.adapter_enabled:
            return y
        return y.index_add_(-1, self.tokens, F.linear(input, self.lora_token_rows))


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Map full names to the tables of which rows train."""
    return {
        name: m
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, TokenRows)
    }


def tables_with_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    """Map the tables of which rows train to their (k,) ids; of two tied ones the embedding."""
    tables: dict[int, tuple[str, torch.Tensor]] = {}
    layers = token_rows(model).items()
    for name, layer in sorted(layers, key=lambda item: not isinstance(item[1], nn.Embedding)):
        tables.setdefault(id(layer.lora_token_rows), (name, layer.tokens))
    return dict(tables.values())


def trained_rows(weight: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(k, width): the rows of these tokens with their difference added in fp32, cast once."""
    return (weight[tokens].float() + rows.float()).to(weight.dtype)


def with_token_rows(
    state: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Return a consolidated state dict with rows merged on a copy; tied tables stay tied.

    Args:
        modules: the tables among them are merged.
    """
    merged = dict(state)
    tables: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
    for name, layer in modules.items():
        if not isinstance(layer, TokenRows):
            continue
        weight, rows = state[f"{name}.weight"], merged.pop(f"{name}.{ROWS_NAME}")
        key = memory_of(weight), memory_of(rows)
        if key not in tables:
            tokens = layer.tokens.to(weight.device)
            tables[key] = weight.index_copy(0, tokens, trained_rows(weight, tokens, rows))
        merged[f"{name}.weight"] = tables[key]
    return merged


@contextlib.contextmanager
def fused_token_rows(model: nn.Module) -> Iterator[None]:
    """Write trained rows into their tables inside the block; after it the base is back bit for bit.

    A table that is tied to one with other rows, or with none, stays as it is. Not for shards.
    """
    layers = [layer for layer in token_rows(model).values() if layer.adapter_enabled]
    own = {id(layer) for layer in layers}
    others = {
        id(p) for m in model.modules() if id(m) not in own for p in m.parameters(recurse=False)
    }
    fused = [layer for layer in layers if id(layer.weight) not in others]
    tables = {id(layer.weight): layer for layer in fused}.values()
    with torch.no_grad():
        originals = [layer.weight[layer.tokens].clone() for layer in tables]
        for layer in tables:
            rows = trained_rows(layer.weight, layer.tokens, layer.lora_token_rows)
            layer.weight[layer.tokens] = rows
    for layer in fused:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, original in zip(tables, originals, strict=True):
                layer.weight[layer.tokens] = original
        for layer in fused:
            layer.adapter_enabled = True


@torch.no_grad()
def merge_token_rows(model: nn.Module) -> None:
    """Write trained rows into their tables for good, and put the plain tables back."""
    done: set[int] = set()
    for name, layer in token_rows(model).items():
        if id(layer.weight) not in done:
            done.add(id(layer.weight))
            with gathered([layer.weight, layer.lora_token_rows], modifier_rank=0):
                rows = trained_rows(layer.weight, layer.tokens, layer.lora_token_rows)
                layer.weight[layer.tokens] = rows
        model.set_submodule(name, layer.base)
