"""Find tokens whose rows in the embedding or the head were never trained, or were just added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

from dschat.lazy import torch
from dschat.utils.distributed import from_main

if TYPE_CHECKING:
    from torch import nn

ALIKE, MANY = 0.99, 8  # an untrained row has a larger cosine than this with more rows than that
NOTHING = 1e-6  # length of a row that counts as zero
ROWS_AT_ONCE = 8192  # of a table in fp32
FIRST_NEW_ROW = "first_new_row"  # attribute of an embedding that was given more rows


@dataclass(frozen=True)
class TokenChoice:
    """Tokens whose rows may train beside the adapters, known before the weights are loaded.

    Attributes:
        texts: of the tokens, by id. predicted: ids that answers hold; the others are only read.
        added: ids that the tokenizer has only just been given.
        always: True: they train in any case; False: where their rows are untrained.
    """

    texts: Mapping[int, str] = field(default_factory=dict)
    predicted: frozenset[int] = frozenset()
    added: frozenset[int] = frozenset()
    always: bool = False

    def reasons(self, tables: Mapping[str, nn.Module]) -> dict[int, str]:
        """Map the ids whose rows are to train to the reason; every rank calls it.

        Args:
            tables: embedding and head by name; of shards one table is gathered at a time.
        """
        from dschat.utils.zero import gathered

        reasons: dict[int, str] = {}
        if self.always:
            return dict.fromkeys(self.texts, "asked for")
        for name, table in tables.items():
            is_embedding = isinstance(table, torch.nn.Embedding)
            first_new = vars(table).get(FIRST_NEW_ROW) if is_embedding else None
            for token in self.texts:
                if token in self.added or (first_new is not None and token >= first_new):
                    reasons[token] = "new"
            weight = cast("nn.Parameter", table.weight)
            counted = [t for t in self.texts if is_embedding or t in self.predicted]
            with gathered([weight]):
                alike = from_main(partial(alike_rows, weight, counted))
            for token, number in zip(counted, alike, strict=True):
                if number > MANY:
                    reasons.setdefault(token, f"its row of {name} is like {number} others")
        return reasons

    def described(self, reasons: Mapping[int, str]) -> str:
        """Name the tokens with their reasons, in words."""
        return ", ".join(f"{self.texts[t]!r} ({t}: {why})" for t, why in reasons.items())


def alike_rows(weight: torch.Tensor, tokens: Sequence[int]) -> list[int]:
    """Count, for the row of each token, the other rows that point the same way as it.

    Rows of zeros, or nearly so, are like each other.

    Args:
        weight: (V, H), complete; read in blocks of rows.
    """
    weight = weight.detach()
    own = _directions(weight[list(tokens)])
    zero = ~own.any(dim=1)
    counts = torch.zeros(len(tokens), dtype=torch.long, device=weight.device)
    for block in weight.split(ROWS_AT_ONCE):
        rows = _directions(block)
        counts += (own @ rows.T > ALIKE).sum(dim=1)
        counts += zero * (~rows.any(dim=1)).sum()
    return (counts - 1).tolist()


def _directions(rows: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1, those that have none to 0."""
    rows = rows.float()
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > NOTHING, rows / lengths, 0.0)
