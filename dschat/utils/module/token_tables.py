"""Tables of a model whose rows of single tokens can train, and where such rows are put."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from dschat.errors import UserError
from dschat.utils.module.fixed_update import move_fixed_update
from dschat.utils.module.token_rows import TokenRows, TokenRowsEmbedding, TokenRowsHead
from dschat.utils.zero import full_shape

SCALED = "ScaledWordEmbedding"  # class names of embeddings that multiply by a number end so


def tables_of(model: nn.Module, trained: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Map full names to the input embedding and, where the model has one, the output head.

    Args:
        trained: names of modules that train fully; tables of theirs are left out.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:  # nobody says what its tables are
        return {}
    tables = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    named = dict(model.named_modules(remove_duplicate=False))
    whole = {id(p) for name in trained for p in named[name].parameters()}
    return {
        name: m
        for name, m in named.items()
        if any(m is table for table in tables) and id(m.weight) not in whole
    }


def obstacle(name: str, table: nn.Module) -> str | None:
    """Explain why rows of this table cannot train; None where they can."""
    kind = type(table)
    if isinstance(table, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward or kind.__name__.endswith(SCALED)
        return None if plain and table.max_norm is None else f"{name} does more than look up rows"
    if not isinstance(table, nn.Linear):
        return f"{name} ({kind.__name__}) has an adapter, or is no plain table"
    if table.bias is not None:
        return f"{name} has a bias, which PEFT leaves out beside rows"
    return None


def check_tables(tables: Mapping[str, nn.Module]) -> None:
    """Raise an error where rows of these tables cannot train.

    Raises:
        UserError: with the reason and the remedy.
    """
    if not tables:
        raise UserError("trainable_tokens: modules_to_save trains every row; drop one of the two")
    reasons = [reason for name, table in tables.items() if (reason := obstacle(name, table))]
    if reasons:
        raise UserError(
            f"trainable_tokens: {reasons[0]}, so single rows cannot train; give modules_to_save "
            f"{' '.join(name.split('.')[-1] for name in tables)} instead"
        )


def add_token_rows(
    model: nn.Module, tokens: Sequence[int], tables: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """Let the rows of these tokens train, in place, in embedding and head.

    Args:
        tables: in place of `tables_of(model)`.

    Raises:
        UserError: a table that cannot have them, or an id beyond it.
        ValueError: no tokens.
    """
    if not tokens:
        raise ValueError("no tokens are given whose rows could train")
    tables = tables_of(model) if tables is None else tables
    check_tables(tables)
    ids = sorted({*tokens})
    shared: dict[int, nn.Parameter] = {}  # by the identity of a table's weight
    for name, table in tables.items():
        weight = cast(nn.Parameter, table.weight)
        vocabulary, width = full_shape(weight)
        if not 0 <= ids[0] <= ids[-1] < vocabulary:
            raise UserError(f"trainable_tokens: {name} has {vocabulary} rows; give ids below that")
        if id(weight) not in shared:
            start = torch.zeros(len(ids), width, dtype=weight.dtype, device=weight.device)
            shared[id(weight)] = nn.Parameter(start)
        parts = torch.tensor(ids, device=weight.device), shared[id(weight)]
        if isinstance(table, nn.Embedding):
            layer: TokenRows = TokenRowsEmbedding(table, *parts)
        else:
            layer = TokenRowsHead(cast(nn.Linear, table), *parts)
        move_fixed_update(table, layer)
        weight.requires_grad_(False)
        model.set_submodule(name, layer)
    return model
