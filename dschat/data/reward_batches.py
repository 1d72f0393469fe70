"""Pairs to batches for a reward model's loss: a row an answer, or a row a pair.

In a pair's row its prompt stands once, then the chosen answer, then the rejected one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from dschat.data.collators import Batch, PairCollator, RewardBatch, Row, real_rows, without_end
from dschat.lazy import np, torch

_ENDLESS_STREAM = 4  # of the seed, apart from those of splits and streams


@dataclass(frozen=True)
class SharedPromptBatch(Batch):
    """Preference pairs, a row each, right-padded; fields are (B, T) unless they say otherwise."""

    segments: torch.Tensor  # int64: 0 prompt, 1 chosen, 2 rejected, 3 padding
    position_ids: torch.Tensor  # int64; of the rejected answer from where the prompt ends
    ends: torch.Tensor  # (B, 2) int64: places of the last tokens of chosen and rejected
    margin: torch.Tensor  # (B,) float32

    @property
    def sequences(self) -> int:
        """Count the real answers."""
        return 2 * int(self.real.sum())


def is_less_work(rows: Sequence[Row]) -> bool:
    """Tell whether a batch of pairs costs less in rows of one pair than in rows of one answer.

    Where attention over all tokens of a row does: twice as many rows may be 1 / sqrt(2) as long.
    """
    apart = max(row["length"] for row in rows)
    together = max(len(_joined(row)) for row in rows)
    return bool(together**2 <= 2 * apart**2)


def shared_prompt_batch(
    rows: Sequence[Row], margin: torch.Tensor, pad_token_id: int
) -> SharedPromptBatch:
    """Join each pair into one row, and pad.

    Args:
        rows: of phase 2. margin: (B,).
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
        real_rows(rows),
        segments,
        position_ids,
        torch.tensor(ends),
        margin,
    )


def _joined(row: Row) -> list[int]:
    return [*row["chosen_ids"], *row["rejected_ids"][row["prompt_len"] :]]


@dataclass(frozen=True)
class RewardCollator:
    """Phase-2 rows → RewardBatch, or SharedPromptBatch.

    Attributes:
        margin: of rows that have none of their own.
        endless_share: share of answers that lose their end token. Which ones, the seed and the
            answer decide, so that a row is the same in every epoch, batch and resumed run.
        share_prompts: a batch has one row a pair where that is less work.
    """

    pad_token_id: int
    margin: float = 0.0
    endless_share: float = 0.0
    seed: int = 0
    share_prompts: bool = False

    def __call__(self, rows: Sequence[Row]) -> RewardBatch | SharedPromptBatch:
        """Pad and stack; raises KeyError on rows of another phase."""
        margins = [row.get("margin") for row in rows]
        if self.endless_share:
            rows = [without_end(row, self._is_endless) for row in rows]
        margin = torch.tensor([self.margin if value is None else value for value in margins])
        margin = margin.float()
        if self.share_prompts and is_less_work(rows):
            return shared_prompt_batch(rows, margin, self.pad_token_id)
        return RewardBatch(**vars(PairCollator(self.pad_token_id)(rows)), margin=margin)

    def _is_endless(self, ids: Sequence[int]) -> bool:
        content = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())
        draw = np.random.default_rng([self.seed, _ENDLESS_STREAM, content]).random()
        return bool(draw < self.endless_share)
