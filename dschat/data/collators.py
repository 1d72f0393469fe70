"""Rows of tokens to padded or packed batches of tensors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from dschat.data.batches import (
    MismatchedBatch,
    PackedBatch,
    PairBatch,
    PreferenceBatch,
    PromptBatch,
    RewardBatch,
    Row,
    SFTBatch,
    SharedPromptBatch,
)
from dschat.data.shared_prompts import is_less_work, shared_prompt_batch

_ENDLESS_STREAM = 4  # of the seed, apart from those of splits and streams


@dataclass(frozen=True)
class SFTCollator:
    """Phase-1 rows → SFTBatch; `train_on_prompt` makes prompt tokens targets too."""

    pad_token_id: int
    train_on_prompt: bool = False

    def __call__(self, rows: Sequence[Row]) -> SFTBatch:
        """Pad to the longest row; raises KeyError on rows of another phase."""
        sequences = [row["input_ids"] for row in rows]
        input_ids, attention_mask, real = _padded(rows, sequences, self.pad_token_id)
        spans = [[0, row["length"]] if self.train_on_prompt else row["trained"] for row in rows]
        loss_mask = _within(spans, attention_mask) & real[:, None]
        # The first token of a sequence has nothing before it to be predicted from.
        loss_mask[:, 0] = False
        return SFTBatch(input_ids, attention_mask, real, loss_mask)


@dataclass(frozen=True)
class PackedCollator:
    """Packs of phase-1 rows → PackedBatch, each pack one row of it."""

    pad_token_id: int
    train_on_prompt: bool = False

    def __call__(self, packs: Sequence[Sequence[Row]]) -> PackedBatch:
        """Join each pack and pad to the longest; raises KeyError on rows of another phase."""
        parts = [SFTCollator(self.pad_token_id, self.train_on_prompt)(pack) for pack in packs]
        joined = [list(chain.from_iterable(row["input_ids"] for row in pack)) for pack in packs]
        input_ids, attention_mask, _ = _padded((), joined, self.pad_token_id)
        loss_mask = torch.zeros_like(attention_mask)
        position_ids = torch.zeros_like(input_ids)
        for row, part in enumerate(parts):
            at = part.attention_mask
            size = int(at.sum())
            loss_mask[row, :size] = part.loss_mask[at]
            position_ids[row, :size] = torch.arange(at.shape[1]).expand_as(at)[at]
        real = torch.stack([part.real.all() for part in parts])
        return PackedBatch(input_ids, attention_mask, real, loss_mask, position_ids)


@dataclass(frozen=True)
class PairCollator:
    """Phase-2 rows → PairBatch, both sides padded to the longest sequence of all."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> PairBatch:
        """Pad and stack chosen over rejected; raises KeyError on rows of another phase."""
        sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        input_ids, attention_mask, real = _padded(rows, sequences, self.pad_token_id)
        starts = torch.tensor(2 * [row["prompt_len"] for row in rows])
        is_answer = torch.arange(attention_mask.shape[1]) >= starts[:, None]
        answer_mask = attention_mask & is_answer & real.repeat(2)[:, None]
        return PairBatch(input_ids, attention_mask, real, answer_mask)


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
            real = torch.tensor([row.get("real", True) for row in rows])
            return shared_prompt_batch(rows, real, margin, self.pad_token_id)
        return RewardBatch(**vars(PairCollator(self.pad_token_id)(rows)), margin=margin)

    def _is_endless(self, ids: Sequence[int]) -> bool:
        content = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes())
        draw = np.random.default_rng([self.seed, _ENDLESS_STREAM, content]).random()
        return bool(draw < self.endless_share)


def without_end(row: Row, chosen: Callable[[Sequence[int]], bool] = lambda ids: True) -> Row:
    """Take the end token off the answers of a pair, of those that `chosen` is true of.

    An answer of nothing else keeps it.
    """
    cut = {
        side: row[side][:-1]
        for side in ("chosen_ids", "rejected_ids")
        if len(row[side]) > row["prompt_len"] + 1 and chosen(row[side])
    }
    return row | cut


@dataclass(frozen=True)
class PreferenceCollator:
    """Phase-2 rows → PreferenceBatch; with `mismatched`, which makes phase-1 rows of them, more.

    Attributes:
        first: number of the set's first row; the evaluation rows follow those of training.
    """

    pad_token_id: int
    first: int = 0
    mismatched: Callable[[Row], Row] | None = None

    def __call__(self, rows: Sequence[Row]) -> PreferenceBatch:
        """Pad and stack chosen over rejected; raises KeyError on rows of another phase."""
        pairs = PairCollator(self.pad_token_id)(rows)
        places = [self.first + row["number"] if "number" in row else -1 for row in rows]
        fields = {**vars(pairs), "numbers": torch.tensor(places)}
        if self.mismatched is None:
            return PreferenceBatch(**fields)
        others = SFTCollator(self.pad_token_id)([self.mismatched(row) for row in rows])
        return MismatchedBatch(**fields, mismatched=others)


@dataclass(frozen=True)
class PromptCollator:
    """Phase-3 rows → PromptBatch."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> PromptBatch:
        """Pad on the left; raises KeyError on rows of another phase."""
        prompts = [row["prompt_ids"] for row in rows]
        own = None
        if all(row.get("columns") is not None for row in rows):
            own = tuple(json.loads(row["columns"]) for row in rows)
        return PromptBatch(*_padded(rows, prompts, self.pad_token_id, left=True), own)


def _padded(
    rows: Sequence[Row],
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    left: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the fields of every batch: ids and mask, both (N, longest), and (B,) rows that are real.

    The mask comes from the lengths of the N sequences, which are of B rows, alone.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = int(lengths.max())
    input_ids = torch.full((len(sequences), width), pad_token_id)  # (N, T)
    for row, ids in enumerate(sequences):
        start = width - len(ids) if left else 0
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
    columns = torch.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    return input_ids, mask, torch.tensor([row.get("real", True) for row in rows])


def _within(spans: Sequence[Sequence[int]], attention_mask: torch.Tensor) -> torch.Tensor:
    """Take a right-padded mask inside each row's [start, stop, start, stop, ...], (N, T)."""
    inside = torch.zeros_like(attention_mask)
    for row, bounds in enumerate(spans):
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
            inside[row, start:stop] = True
    return attention_mask & inside
