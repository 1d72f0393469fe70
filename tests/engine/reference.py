"""Plain PyTorch's LoRA+ on the whole global batch: written apart from `dschat`, slow and short."""

from __future__ import annotations

import math

import cells
import torch
import torch.nn.functional as F
from torch import nn

from dschat.utils.engine import torch_dtype


class PlainLora(nn.Module):
    """y = x W^T + (alpha / r) (x A^T) B^T."""

    def __init__(self, base: nn.Linear, drawn_in: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(cells.RANK, base.in_features, dtype=drawn_in).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(start.float())
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, cells.RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = x @ self.lora_A.T @ self.lora_B.T
        return x @ self.weight.T + cells.ALPHA / cells.RANK * update


def add_adapters(module: nn.Module, drawn_in: torch.dtype) -> None:
    """On every linear layer of the blocks, in the order of the model's text."""
    torch.manual_seed(cells.ADAPTER_SEED)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name not in ("lm_head", "v_head"):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, PlainLora(layer, drawn_in))


def groups_of(module: nn.Module, full: bool) -> list[dict]:
    """AdamW's groups by hand: rates and weight decay of LoRA+, or of training all weights."""
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(full or "lora_" in name or name == "v_head.weight")

    def having(*parts: str) -> list[nn.Parameter]:
        return [p for n, p in named.items() if any(part in n for part in parts)]

    if full:
        norms = having("norm")
        others = [p for p in named.values() if all(p is not norm for norm in norms)]
        return [
            {"params": others, "lr": cells.BASE_RATE, "weight_decay": cells.WEIGHT_DECAY},
            {"params": norms, "lr": cells.BASE_RATE, "weight_decay": 0.0},
        ]
    rates = {
        "lora_A": cells.BASE_RATE,
        "lora_B": cells.RATIO * cells.BASE_RATE,
        "v_head": cells.HEAD_RATE,
    }
    return [
        {"params": having(part), "lr": rate, "weight_decay": cells.WEIGHT_DECAY}
        for part, rate in rates.items()
        if having(part)
    ]


def mean_loss(module: nn.Module, rows: list[int]) -> torch.Tensor:
    """Mean over the trained tokens, or over the pairs, of all these rows at once."""
    if hasattr(module, "lm_head"):
        ids, mask, loss_mask = cells.sft_batch(rows)
        logits = module(input_ids=ids, attention_mask=mask.long()).logits
        labels = ids.masked_fill(~loss_mask, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ids, mask, _ = cells.pair_batch(rows, size=len(rows))
    hidden = module.rwtransformer(input_ids=ids, attention_mask=mask.long())[0]
    ends = hidden[torch.arange(len(ids)), mask.sum(dim=1) - 1]
    chosen, rejected = (ends @ module.v_head.weight[0]).chunk(2)
    return torch.log1p(torch.exp(rejected - chosen)).mean()


def train(cell: cells.Cell, steps: int) -> tuple[dict, list[float], list[float]]:
    """State dict after so many steps; the losses and the gradient norms before clipping.

    Always fp32; a bf16 cell starts from weights rounded to bf16.
    """
    dtype = torch_dtype(cell.dtype)
    module = cells.build_module(cell.model).to(dtype).float().train()
    if not cell.full:
        add_adapters(module, dtype)
    groups = groups_of(module, cell.full)
    optimizer = torch.optim.AdamW(groups, betas=cells.BETAS, eps=cells.EPS)
    trained = [p for group in groups for p in group["params"]]
    peaks = [group["lr"] for group in groups]
    losses, norms = [], []
    for step, rows in enumerate(cells.cell_steps(cell)[:steps]):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        loss = mean_loss(module, rows)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(trained, cells.CLIP).item())
        optimizer.step()
    return module.state_dict(), losses, norms


def factor(step: int) -> float:
    """The linear schedule: 0, 1/2, 1, 3/4, 1/2, ... with a warm-up of 2 of 6 steps."""
    if step < cells.WARM_UP:
        return step / cells.WARM_UP
    return (cells.TOTAL_STEPS - step) / (cells.TOTAL_STEPS - cells.WARM_UP)
