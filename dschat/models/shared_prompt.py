"""A pair in one row: its prompt once, then both answers, neither of which sees the other."""

from __future__ import annotations

import torch
from torch import nn

from dschat.models.packing import masked_inputs

PROMPT, CHOSEN, REJECTED, PADDING = range(4)


def shared_prompt_inputs(
    trunk: nn.Module, input_ids: torch.Tensor, segments: torch.Tensor, position_ids: torch.Tensor
) -> dict:
    """Build the keyword arguments of a pass in which an answer sees the prompt and itself.

    Args:
        input_ids: (B, T). segments: (B, T), `PROMPT` to `PADDING` in this order.
        position_ids: (B, T), of the rejected answer counted from the end of the prompt.
    """
    return masked_inputs(trunk, input_ids, tree_mask(segments), position_ids)


def tree_mask(segments: torch.Tensor) -> torch.Tensor:
    """Mask of pairs: (B, T) segments -> (B, 1, T, T) bool; [b, 0, q, k]: q may see k."""
    own = segments[:, None, :, None] == segments[:, None, None, :]
    prompt = (segments == PROMPT)[:, None, None, :]
    return (own | prompt).tril()
