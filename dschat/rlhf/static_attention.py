"""Attention of one new token in each row to the keys and values of a static cache.

Two things that the model's own attention does in every step are left out: the keys of grouped
queries are not repeated, and on a CPU the two products are made by plain matrix products, which are
faster there for a single token than the fused kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

NAME = "dschat_static"
IMPLEMENTATIONS = ("sdpa", "eager")  # of which this computes the same
UNKNOWN = ("softcap", "s_aux", "head_mask")  # arguments that change what attention computes


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: (N, H, 1, D) queries, (N, K, W, D) keys and values.

    Args:
        attention_mask: (N, 1, 1, W), added to the scores.

    Returns:
        (N, 1, H, D), and no weights.

    Raises:
        NotImplementedError: the model asks for more than scaled dot products.
    """
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, _, size = query.shape
    # The queries of a group stand where tokens of one head would: keys are not repeated.
    grouped = query.reshape(rows, key.shape[1], -1, size)
    if query.device.type == "cpu" and query.dtype == torch.float32:
        scores = torch.matmul(grouped * scaling, key.transpose(-1, -2)) + attention_mask
        mixed = torch.matmul(scores.softmax(-1), value)
    else:
        mixed = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def static_attention(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """Make the models of these configs use `attend` as attention inside the block."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Collect the configs that a model's modules ask for their attention, each once."""
    found = {
        id(config): config
        for module in model.modules()
        if isinstance(config := vars(module).get("config"), PretrainedConfig)
    }
    return list(found.values())


def decoding_masks(
    windows: Sequence[int | None],
    columns: torch.Tensor,
    first: torch.Tensor,
    span: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Make the masks of one step, (N, 1, 1, W), to be added to scores.

    Args:
        columns: (N,) the column of each row's token. first: (N,) of its first token.
        span: (W,) 0, 1, 2, ...

    Returns:
        One mask for all layers, or where they differ one for each of transformers' layer types.
    """
    lowest = torch.finfo(dtype).min

    def mask(window: int | None) -> torch.Tensor:
        after = first if window is None else torch.maximum(first, columns - (window - 1))
        seen = (span >= after.unsqueeze(-1)) & (span <= columns.unsqueeze(-1))  # (N, W)
        return torch.where(seen, 0.0, lowest).to(dtype)[:, None, None]

    kinds = set(windows)
    if len(kinds) == 1:
        return mask(*kinds)
    (window,) = kinds - {None}
    return {"full_attention": mask(None), "sliding_attention": mask(window)}
