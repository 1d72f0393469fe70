"""Pairs as rows of one pair: the prompt once, then the chosen answer, then the rejected one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dschat.data.batches import Row, SharedPromptBatch


def is_less_work(rows: Sequence[Row]) -> bool:
    """Return whether a batch of pairs costs less in rows of one pair than in rows of one answer.

    Where attention over all tokens of a row does: twice as many rows may be 1 / sqrt(2) as long.
    """
    apart = max(row["length"] for row in rows)
    together = max(len(_joined(row)) for row in rows)
    return bool(together**2 <= 2 * apart**2)


def shared_prompt_batch(
    rows: Sequence[Row], real: torch.Tensor, margin: torch.Tensor, pad_token_id: int
) -> SharedPromptBatch:
    """Join each pair into one row, and pad.

    Args:
        rows: of phase 2. real: (B,) bool. margin: (B,).
    """
    joined = [_joined(row) for row in rows]
    width = max(map(len, joined))
    size = (len(rows), width)
    input_ids, segments = torch.full(size, pad_token_id), torch.full(size, 3)
    position_ids, ends = torch.zeros(size, dtype=torch.int64), []
    for number, (row, ids) in enumerate(zip(rows, joined, strict=True)):
        prompt, chosen, rejected = (
            row["prompt_len"],
            len(row["chosen_ids"]),
            len(row["rejected_ids"]),
        )
        end = chosen + rejected - prompt
        input_ids[number, :end] = torch.tensor(ids)
        for segment, (start, stop) in enumerate(((0, prompt), (prompt, chosen), (chosen, end))):
            segments[number, start:stop] = segment
        position_ids[number, :chosen] = torch.arange(chosen)
        position_ids[number, chosen:end] = torch.arange(prompt, rejected)
        ends.append([chosen - 1, end - 1])
    return SharedPromptBatch(
        input_ids,
        segments != 3,
        real,
        segments,
        position_ids,
        torch.tensor(ends),
        margin,
    )


def _joined(row: Row) -> list[int]:
    return [*row["chosen_ids"], *row["rejected_ids"][row["prompt_len"] :]]
