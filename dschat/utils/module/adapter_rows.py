"""Rows of single tokens in PEFT's adapter files (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROWS_ADAPTER = "token_adapter"  # between the name of a table and those of its parts
ROWS_LEAF = f"{ROWS_ADAPTER}.trainable_tokens_delta"  # of complete rows, not of differences

TokenIndices = dict[str, list[int]]  # by the end of a table's name; "" for the input embedding


@dataclass(frozen=True)
class Rows:
    """Rows of a table that take the place of the base's: (k,) ids and (k, width) values."""

    tokens: torch.Tensor
    values: torch.Tensor

    def put_into(self, table: torch.Tensor) -> torch.Tensor:
        """Copy a (V, width) table with these rows in it."""
        return table.index_copy(0, self.tokens.to(table.device), self.values.to(table))

    def misfit(self, name: str, table: nn.Module | None, shape: torch.Size) -> str | None:
        """Explain why these rows cannot be put into a table; None where they can.

        Args:
            shape: of the table's weight, complete.
        """
        if not isinstance(table, (nn.Linear, nn.Embedding)):
            return f"no table {name} for rows of tokens"
        if getattr(table, "bias", None) is not None:
            return f"{name} has a bias, which PEFT leaves out beside rows of tokens"
        if self.values.shape != (len(self.tokens), shape[1]):
            return f"rows {tuple(self.values.shape)} of {name}: {len(self.tokens)} tokens are named"
        inside = (self.tokens >= 0) & (self.tokens < shape[0])
        return None if inside.all() else f"{name} has {shape[0]} rows, fewer than a token's id"


def read_indices(raw: Any) -> TokenIndices:
    """Read `trainable_token_indices`; a bare list is the input embedding's."""
    by_end = raw if isinstance(raw, dict) else {"": raw or []}
    return {end: [int(token) for token in tokens] for end, tokens in by_end.items() if tokens}


def take_rows(
    tensors: Mapping[str, torch.Tensor], indices: TokenIndices
) -> tuple[dict[str, Rows], dict[str, torch.Tensor], list[str]]:
    """Take the rows out of an adapter's tensors.

    Returns:
        The rows by the name of their table, the other tensors with plain names, and faults. Of two
        tied tables PEFT stores the embedding's alone.
    """
    rows, others, faults = {}, {}, []
    for key, tensor in tensors.items():
        table = key.removesuffix(f".{ROWS_LEAF}")
        tokens = next((ids for end, ids in indices.items() if table.endswith(end)), None)
        if table == key:
            others[key.replace(f".{ROWS_ADAPTER}.base_layer.", ".")] = tensor
        elif tokens is None:
            faults.append(f"unexpected {key}")
        else:
            rows[table] = Rows(torch.tensor(tokens), tensor)
    stored = [row.tokens.tolist() for row in rows.values()]
    faults += [
        f"missing {ROWS_LEAF} of {end or 'the embedding'}"
        for end, tokens in indices.items()
        if tokens not in stored
    ]
    return rows, others, faults
