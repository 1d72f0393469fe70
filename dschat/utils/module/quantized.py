"""LoRA over frozen weights in 4 or 8 bits, with the formats and kernels of `bitsandbytes`.

4bit is NF4 with double quantisation (QLoRA, arXiv:2305.14314), about half a byte a weight; 8bit
keeps a scale for each row. The de-quantised weight is computed again in the forward and in the
backward pass and never kept: saving, scoring and merging see the weight that trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRALinear


class _FrozenMatmul(torch.autograd.Function):
    """x W^T with a frozen W that each pass unpacks again; nothing of it is kept between passes."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rows: Callable[[], torch.Tensor]) -> torch.Tensor:
        """(N, in) -> (N, out)."""
        ctx.rows = rows
        return torch.mm(x, rows().t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(N, out) -> the gradient of x."""
        return torch.mm(grad, ctx.rows()), None


class QuantizedLoRALinear(LoRALinear):
    """A linear layer with a quantised, frozen weight, and an adapter like any other.

    The packed weight is no parameter and in no state dict: it comes from the base model's files
    each time. It is packed on the device that trains, layer by layer.
    """

    packed: torch.Tensor
    _state: Any  # what bitsandbytes needs to unpack: a QuantState, or the rows' scales

    def _keep_weight(self, weight: nn.Parameter, config: LoraConfig) -> None:
        from bitsandbytes import functional as bnb

        self.dtype, self.bits = weight.dtype, config.quantize_base
        device = weight.device
        if device.type == "cpu":  # models load there; packing belongs to the device that trains
            from deepspeed.accelerator import get_accelerator

            device = torch.device(get_accelerator().current_device_name())
        rows = self.rows(weight.detach()).contiguous().to(device)
        if self.bits == "4bit":
            packed, self._state = bnb.quantize_4bit(
                rows, quant_type="nf4", compress_statistics=True
            )
        else:
            packed, self._state, _ = bnb.int8_vectorwise_quant(rows.half())
        self.register_buffer("packed", packed, persistent=False)

    @torch.no_grad()
    def dense_weight(self) -> torch.Tensor:
        """Unpack the weight that the layer computes with, in the base's layout and dtype."""
        from bitsandbytes import functional as bnb

        unpack = bnb.dequantize_4bit if self.bits == "4bit" else bnb.int8_vectorwise_dequant
        return self.rows(unpack(self.packed, self._state).to(self.dtype))

    @property
    def weight_numel(self) -> int:
        """Number of packed weights."""
        return self.in_features * self.out_features

    def _base(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = _FrozenMatmul.apply(x, lambda: self.rows(self.dense_weight()))
        return y if bias is None else y + bias

    def _can_run_in_one(self, bias: torch.Tensor | None) -> bool:
        return False

    def extra_repr(self) -> str:
        """Describe shapes, scaling and bits for `print(model)`."""
        return f"{super().extra_repr()}, {self.bits}"
