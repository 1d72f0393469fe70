"""Plain PyTorch's LoRA+ on the whole global batch: written apart from `dschat`, slow and short."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.train.engine import torch_dtype
from tests.train import cells


class PlainLora(nn.Module):
    """y = m / |W'| * x W'^T + b with W' = W + s B A; without DoRA m / |W'| is left out."""

    def __init__(self, base: nn.Module, drawn_in: torch.dtype, everything: bool):
        super().__init__()
        self.weight = base.weight
        self.is_table = isinstance(base, nn.Embedding)
        self.turned = self.is_table or isinstance(base, Conv1D)  # (in, out)
        outputs, inputs = self.rows().shape
        if getattr(base, "bias", None) is not None:
            self.bias = base.bias
        start_A, start_B = torch.zeros(cells.RANK, inputs), torch.zeros(outputs, cells.RANK)
        if everything:
            start_B = start_B.to(drawn_in).normal_(std=1 / math.sqrt(cells.RANK)).float()
            self.lora_magnitude = nn.Parameter(self.rows().detach().pow(2).sum(1).sqrt())
        else:
            bound = 1 / math.sqrt(inputs)
            start_A = start_A.to(drawn_in).uniform_(-bound, bound).float()
        self.names = [f"lora_{'embedding_' * self.is_table}{matrix}" for matrix in "AB"]
        for name, start in zip(self.names, (start_A, start_B), strict=True):
            setattr(self, name, nn.Parameter(start))
        self.scaling = cells.ALPHA / (math.sqrt(cells.RANK) if everything else cells.RANK)

    def rows(self) -> torch.Tensor:
        return self.weight.T if self.turned else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = (getattr(self, name) for name in self.names)
        rows = self.rows() + self.scaling * B @ A
        if hasattr(self, "lora_magnitude"):
            rows = rows * (self.lora_magnitude / rows.pow(2).sum(1).sqrt().detach())[:, None]
        if self.is_table:
            return rows.T[x]
        return x @ rows.T + (self.bias if hasattr(self, "bias") else 0.0)


class PlainRows(nn.Module):
    """An embedding or head with W' = W, and a trained difference on the rows of `cells.TOKENS`."""

    def __init__(self, base: nn.Module, rows: nn.Parameter):
        super().__init__()
        self.weight, self.lora_token_rows = base.weight, rows
        self.is_table = isinstance(base, nn.Embedding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.index_add(0, torch.tensor(cells.TOKENS), self.lora_token_rows)
        return rows[x] if self.is_table else x @ rows.T


def add_rows(module: nn.Module) -> None:
    """On embedding and head; tied ones share their rows."""
    names = [n for n, _ in module.named_modules() if n.endswith((".embed_tokens", ".wte"))]
    names += [name for name, _ in module.named_modules() if name == "lm_head"]
    made: dict[int, nn.Parameter] = {}
    for name in names:
        base, (parent, _, leaf) = module.get_submodule(name), name.rpartition(".")
        start = torch.zeros(len(cells.TOKENS), base.weight.shape[1])
        rows = made.setdefault(id(base.weight), nn.Parameter(start))
        setattr(module.get_submodule(parent), leaf, PlainRows(base, rows))


class PlainExperts(nn.Module):
    """The sum W + s B A in place of a bare parameter W, while its module runs."""

    def __init__(self, module: nn.Module, leaf: str, drawn_in: torch.dtype):
        super().__init__()
        self.leaf, self.turned = leaf, leaf != "weight" and module.is_transposed
        *experts, outputs, inputs = self.rows(module).shape
        start_A = torch.zeros(*experts, cells.RANK, inputs).to(drawn_in)
        bound = 1 / math.sqrt(inputs)
        A = nn.Parameter(start_A.uniform_(-bound, bound).float())
        B = nn.Parameter(torch.zeros(*experts, outputs, cells.RANK))
        module.register_parameter(f"lora_A_{leaf}", A)
        module.register_parameter(f"lora_B_{leaf}", B)
        module.register_forward_pre_hook(self.put)
        module.register_forward_hook(self.take_away)

    def rows(self, module: nn.Module) -> torch.Tensor:
        weight = module.get_parameter(self.leaf)
        return weight.mT if self.turned else weight

    def put(self, module: nn.Module, _) -> None:
        A, B = (getattr(module, f"lora_{matrix}_{self.leaf}") for matrix in "AB")
        rows = self.rows(module) + cells.ALPHA / cells.RANK * B @ A
        vars(module)[self.leaf] = rows.mT if self.turned else rows

    def take_away(self, module: nn.Module, *_) -> None:
        del vars(module)[self.leaf]


@torch.no_grad()
def round_weights(module: nn.Module, bits: str) -> None:
    """Every linear layer of the blocks to what 4 or 8 bits can hold."""
    from bitsandbytes import functional as bnb

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name not in ("lm_head", "v_head"):
            if bits == "4bit":
                packed = bnb.quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
                layer.weight.copy_(bnb.dequantize_4bit(*packed))
            else:
                packed, scale, _ = bnb.int8_vectorwise_quant(layer.weight.half())
                layer.weight.copy_(bnb.int8_vectorwise_dequant(packed, scale))


def add_adapters(module: nn.Module, drawn_in: torch.dtype, everything: bool) -> None:
    """On every linear layer of the blocks, in the order of the model's text; then the table."""
    torch.manual_seed(cells.ADAPTER_SEED)
    linear = [n for n, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    tables = [n for n, _ in module.named_modules() if n.endswith((".embed_tokens", ".wte"))]
    for name in [*linear, *(tables if everything else [])]:
        if name not in ("lm_head", "v_head"):
            parent, _, leaf = name.rpartition(".")
            layer = PlainLora(module.get_submodule(name), drawn_in, everything)
            setattr(module.get_submodule(parent), leaf, layer)
    for kind, leaves in (("Experts", ("gate_up_proj", "down_proj")), ("Router", ("weight",))):
        for part in [m for m in module.modules() if type(m).__name__.endswith(kind)]:
            for leaf in leaves:
                PlainExperts(part, leaf, drawn_in)


def groups_of(module: nn.Module, cell: cells.Cell) -> list[dict]:
    """AdamW's groups by hand: rates and weight decay of LoRA+, or of training all weights."""
    base, decay = cells.BASE_RATE, cells.WEIGHT_DECAY
    whole = ("model.norm.", "rwtransformer.norm.", "transformer.ln_f.") if cell.everything else ()
    rules = [  # first match; what matches none is frozen
        (("lora_A",), base, decay),
        (("lora_B",), cells.RATIO * base, decay),
        (("lora_embedding",), cells.EMBEDDING_RATE, decay),
        (("lora_magnitude",), base, 0.0),
        (("lora_token_rows",), cells.TOKENS_RATE, 0.0),
        (("v_head",), cells.HEAD_RATE, decay),
        (whole, base, 0.0),
    ]
    if cell.full:
        rules = [(("norm",), base, 0.0), (("",), base, decay)]
    members: list[list[nn.Parameter]] = [[] for _ in rules]
    for name, parameter in module.named_parameters():
        hits = [i for i, (parts, *_) in enumerate(rules) if any(part in name for part in parts)]
        parameter.requires_grad_(bool(hits))
        if hits:
            members[hits[0]].append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": decay}
        for found, (_, rate, decay) in zip(members, rules, strict=True)
        if found
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
    if cell.quantize is not None:
        round_weights(module, cell.quantize)
    if not cell.full:
        add_adapters(module, dtype, cell.everything)
    if cell.tokens:
        add_rows(module)
    groups = groups_of(module, cell)
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
