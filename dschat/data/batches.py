"""Batches of tensors: what collators make, the losses read, and a device is given."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from dschat.data.columns import OwnColumns, picked

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


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts to generate from, left-padded, all (B, P)."""

    columns: OwnColumns | None = None  # (B,) rows' own columns by name; None: none are kept

    def rows(self, index: torch.Tensor) -> PromptBatch:
        """Pick the rows of `index`, in its order, also several times."""
        at = index.to(self.real.device)
        tensors = (self.input_ids[at], self.attention_mask[at], self.real[at])
        return PromptBatch(*tensors, picked(self.columns, index))
