"""Arithmetic of a low-rank update: initialisation, x (W + s B A)^T in one product, merging."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


@torch.no_grad()
def draw_adapter(lora_A: torch.Tensor, lora_B: torch.Tensor, init: str) -> None:
    """Draw A uniformly from ±1/sqrt(in), or B with variance 1/r; set the other one to zero.

    Args:
        lora_A: (..., r, in). lora_B: (..., out, r). init: "A" or "B", the random one.
    """
    rank, width = lora_A.shape[-2:]
    if init == "A":
        bound = 1.0 / math.sqrt(width)
        lora_A.uniform_(-bound, bound)
        lora_B.zero_()
    else:
        lora_A.zero_()
        lora_B.normal_(std=1.0 / math.sqrt(rank))


def merged_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Return W + s B A in fp32, with DoRA's (out,) magnitude rescaled row by row, cast once.

    Weights with a leading axis of experts are merged one expert at a time.

    Args:
        weight: (out, in), or (in, out) when `transposed`; the result has its layout and dtype.
    """
    if weight.ndim == 3:
        experts = zip(weight, lora_A, lora_B, strict=True)
        merge = functools.partial(merged_weight, scaling=scaling, transposed=transposed)
        return torch.stack([merge(*expert) for expert in experts])
    rows = (weight.t() if transposed else weight).float()
    rows = rows + (lora_B.float() @ lora_A.float()) * scaling
    if magnitude is not None:
        lengths = torch.linalg.vector_norm(rows, dim=1).to(magnitude.dtype)
        rows *= (magnitude / lengths).float().unsqueeze(1)
    return (rows.t() if transposed else rows).to(weight.dtype).contiguous()


def affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """Map (N, in) to (N, out) by a weight stored as (out, in), or (in, out) when `transposed`."""
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


class LoRAMatmul(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with W and b frozen; saves only x and the (N, r) product.

    The update is added inside the matrix product, without a second (N, out) tensor; the backward
    pass does the same for the gradient of x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, lora_A, lora_B, scaling):
        """(N, in) -> (N, out)."""
        down = torch.mm(x, lora_A.t()).mul_(scaling)  # (N, r)
        ctx.transposed, ctx.scaling = transposed, scaling
        # Parameters, not views of them: a view would keep what ZeRO-3 has gathered alive.
        ctx.save_for_backward(x, weight, lora_A, lora_B, down)
        return affine(x, weight, bias, transposed).addmm_(down, lora_B.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """(N, out) -> gradients of x, A and B."""
        x, weight, lora_A, lora_B, down = ctx.saved_tensors
        grad_down = torch.mm(grad, lora_B).mul_(ctx.scaling)  # (N, r)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight.t() if ctx.transposed else weight)
            grad_x.addmm_(grad_down, lora_A)
        if ctx.needs_input_grad[4]:
            grad_A = torch.mm(grad_down.t(), x)
        if ctx.needs_input_grad[5]:
            grad_B = torch.mm(grad.t(), down)
        return grad_x, None, None, None, grad_A, grad_B, None
