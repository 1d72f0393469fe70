"""A model's two passes over a static cache: entire prompts, and one token of each row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dschat.models.causal_lm import forward_inputs, takes_argument
from dschat.rlhf.static_attention import (
    IMPLEMENTATIONS,
    configs_of,
    decoding_masks,
    static_attention,
)
from dschat.rlhf.static_cache import StaticCache, windows_of
from dschat.utils.module.lora import adapted_layers
from dschat.utils.zero import full_shape

Step = Callable[..., torch.Tensor]

IN_SHARDS = "ZeRO-3 holds its weights in shards; gather_for_rollouts makes them whole meanwhile"


def obstacle(model: nn.Module) -> str | None:
    """Explain why a static cache cannot serve this model; None: it may, if it passes the proof."""
    config: Any = model.config
    if not takes_argument(model, "position_ids"):
        return "it takes no position_ids"
    if config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention is {config._attn_implementation}"
    windows = windows_of(config)
    if windows is None:
        return "its cache holds more than keys and values"
    if len({*windows} - {None}) > 1:
        return "its layers have windows of several sizes"
    if any(p.shape != full_shape(p) for p in model.parameters()):
        return IN_SHARDS
    return None


@dataclass
class StaticModel:
    """A causal LM in eval mode, without an `obstacle`.

    Attributes:
        records: on a CPU, record the step's operations once and repeat them without Python.
    """

    model: nn.Module
    records: bool = True
    _recorded: Step | None = field(default=None, repr=False)
    _recorded_for: tuple = field(default=(), repr=False)

    def __post_init__(self) -> None:
        config: Any = self.model.config
        windows = windows_of(config)
        assert windows is not None
        self.windows, self.configs = windows, configs_of(self.model)
        first = next(self.model.parameters())
        self.dtype, self.device = first.dtype, first.device

    def cache(self, rows: int) -> StaticCache:
        """Make an empty cache for so many rows."""
        return StaticCache(self.windows, rows)

    @property
    def is_recording(self) -> bool:
        """Return whether steps are recorded, as they are on a CPU."""
        return self.records and self.device.type == "cpu"

    def refresh(self) -> None:
        """Keep the recorded step where it still holds; to be called before a set of prompts.

        It reads weights where they lie, so that an optimizer's steps in place change nothing here.
        """
        state = (
            *(p.data_ptr() for p in self.model.parameters()),
            *(layer.adapter_enabled for layer in adapted_layers(self.model)),
        )
        if state != self._recorded_for:
            self._recorded, self._recorded_for = None, state

    def prefill(
        self,
        cache: StaticCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        source: torch.Tensor,
    ) -> torch.Tensor:
        """Store prompts, and give the logits of what comes next.

        Args:
            input_ids, attention_mask: (B, P) prompts, padded on the left, each but once.
            rows: (n,) rows of the cache. source: (n,) their prompts' places in the batch.

        Returns:
            (n, V) logits.
        """
        inputs: dict[str, Any] = forward_inputs(self.model, input_ids, attention_mask)
        if takes_argument(self.model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        cache.place.rows, cache.place.source = rows, source
        try:
            outputs = self.model(**inputs, past_key_values=cache, use_cache=True)
        finally:
            cache.place.rows = None
        return outputs.logits[source, -1]

    def step(
        self,
        cache: StaticCache,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        first: torch.Tensor,
        width: int,
    ) -> torch.Tensor:
        """Decode one token of each row.

        Args:
            tokens: (N,) ids. columns: (N,) where they go. first: (N,) where their texts begin.
            width: columns that are looked at, above every column that counts.

        Returns:
            (N, V) logits of what comes next.
        """
        inputs = tokens, columns, first, torch.arange(width, device=columns.device)
        if not self.is_recording:
            return self._plain(cache)(*inputs, *cache.tensors)
        if self._recorded is None:
            self._recorded = self._record(cache, inputs)
        return self._recorded(*inputs, *cache.tensors)

    def _record(self, cache: StaticCache, inputs: tuple[torch.Tensor, ...]) -> Step:
        tensors = cache.tensors
        # Recording runs the step, on a copy of two rows: of one, its size could become a constant.
        *rows, span = inputs
        example = (*(x[[0, -1]] for x in rows), span, *(x[[0, -1]] for x in tensors))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # Of a module, not of a function: its weights are then read at each step. Those of
                # a function would be constants, of which equal ones are made one.
                step = _AsModule(self.model, self._plain(cache))
                recorded = torch.jit.trace(step, example, check_trace=False, strict=False)
        finally:
            cache.tensors = tensors
        # What depends on values (an expert that no token of the example chose) is not in it.
        if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in said):
            self.records = False
            return self._plain(cache)
        return recorded

    def _plain(self, cache: StaticCache) -> Step:
        """Step as a function of tensors alone."""

        def step(
            tokens: torch.Tensor,
            columns: torch.Tensor,
            first: torch.Tensor,
            span: torch.Tensor,
            *tensors: torch.Tensor,
        ) -> torch.Tensor:
            cache.tensors = tensors
            cache.place.columns, cache.place.width = columns, span.shape[0]
            inputs: dict[str, Any] = {
                "input_ids": tokens.unsqueeze(-1),
                "attention_mask": decoding_masks(self.windows, columns, first, span, self.dtype),
                "position_ids": (columns - first).unsqueeze(-1),
                "past_key_values": cache,
                "use_cache": True,
            }
            with static_attention(self.configs):
                return self.model(**inputs).logits[:, -1]

        return step


class _AsModule(nn.Module):
    """A step of a model as a module around it."""

    def __init__(self, model: nn.Module, step: Step):
        super().__init__()
        self.model = model
        self._step = (step,)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """See `StaticModel._plain`."""
        return self._step[0](*tensors)
