"""Rows of tokens to padded or packed batches of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, TypeVar

from dschat.data.columns import OwnColumns, picked
from dschat.lazy import torch

Row = dict[str, Any]
BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Fields of every batch; a row whose `real` is False is filler and must count nowhere."""

    input_ids: torch.Tensor  # int64
    attention_mask: torch.Tensor  # bool, shaped like input_ids; True = not padding
    real: torch.Tensor  # (B,) bool

    @property
    def sequences(self) -> int:
        """Count the real sequences."""
        return int(self.real.sum()) * (len(self.input_ids) // len(self.real))

    def to(self: BatchT, device: torch.device | str) -> BatchT:
        """The same batch with every tensor on `device`; onto a GPU while the host goes on."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        movable: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Batch) else moved(value, device)
            for name, value in values.items()
            if isinstance(value, torch.Tensor | Batch)
        }
        return replace(self, **movable)


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor; by pinned memory from host to GPU, which needs no wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class SFTBatch(Batch):
    """Prompts with their answers, right-padded, all (B, T)."""

    loss_mask: torch.Tensor  # (B, T) bool; [b, t] True = token t is a target to be predicted


@dataclass(frozen=True)
class PackedBatch(SFTBatch):
    """Several sequences in each row, one after another; each attends to itself alone."""

    position_ids: torch.Tensor  # (B, T) int64; 0 where a sequence begins, and on padding

    @property
    def sequences(self) -> int:
        """Count the real sequences."""
        begins = self.attention_mask & (self.position_ids == 0)
        return int(begins[self.real].sum())


@dataclass(frozen=True)
class PairBatch(Batch):
    """Preference pairs, right-padded: rows 0..B-1 chosen, rows B..2B-1 rejected, all (2B, T)."""

    answer_mask: torch.Tensor  # (2B, T) bool; True = token of the answer, its end token included


@dataclass(frozen=True)
class RewardBatch(PairBatch):
    """Preference pairs with the margins that a reward model's loss asks for."""

    margin: torch.Tensor  # (B,) float32


@dataclass(frozen=True)
class PreferenceBatch(PairBatch):
    """Preference pairs whose places in their sets are known."""

    numbers: torch.Tensor  # (B,) int64; -1 in a stream


@dataclass(frozen=True)
class MismatchedBatch(PreferenceBatch):
    """The same, and each pair's prompt with an answer to another prompt."""

    mismatched: SFTBatch  # B rows


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts to generate from, left-padded, all (B, P)."""

    columns: OwnColumns | None = None  # (B,) rows' own columns by name; None: none are kept

    def rows(self, index: torch.Tensor) -> PromptBatch:
        """Pick the rows of `index`, in its order, also several times."""
        at = index.to(self.real.device)
        tensors = (self.input_ids[at], self.attention_mask[at], self.real[at])
        return PromptBatch(*tensors, picked(self.columns, index))


@dataclass(frozen=True)
class SFTCollator:
    """Phase-1 rows → SFTBatch; `train_on_prompt` makes prompt tokens targets too."""

    pad_token_id: int
    train_on_prompt: bool = False

    def __call__(self, rows: Sequence[Row]) -> SFTBatch:
        """Pad to the longest row; raises KeyError on rows of another phase."""
        input_ids, attention_mask = _pad([row["input_ids"] for row in rows], self.pad_token_id)
        real = real_rows(rows)
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
        input_ids, attention_mask = _pad(joined, self.pad_token_id)
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
        input_ids, attention_mask = _pad(sequences, self.pad_token_id)
        real = real_rows(rows)
        starts = torch.tensor(2 * [row["prompt_len"] for row in rows])
        is_answer = torch.arange(attention_mask.shape[1]) >= starts[:, None]
        answer_mask = attention_mask & is_answer & real.repeat(2)[:, None]
        return PairBatch(input_ids, attention_mask, real, answer_mask)


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
        if any("columns" in row for row in rows):
            own = tuple(json.loads(row["columns"]) for row in rows)
        return PromptBatch(*_pad(prompts, self.pad_token_id, left=True), real_rows(rows), own)


def _pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int64) and mask (bool), both (N, longest); the mask comes from lengths alone."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = int(lengths.max())
    input_ids = torch.full((len(sequences), width), pad_token_id)  # (N, T)
    for row, ids in enumerate(sequences):
        start = width - len(ids) if left else 0
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
    columns = torch.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    return input_ids, mask


def _within(spans: Sequence[Sequence[int]], attention_mask: torch.Tensor) -> torch.Tensor:
    """Take a right-padded mask inside each row's [start, stop, start, stop, ...], (N, T)."""
    inside = torch.zeros_like(attention_mask)
    for row, bounds in enumerate(spans):
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
            inside[row, start:stop] = True
    return attention_mask & inside


def real_rows(rows: Sequence[Row]) -> torch.Tensor:
    """(B,) bool: True for rows that are no filler."""
    return torch.tensor([row.get("real", True) for row in rows])
