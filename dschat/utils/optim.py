"""Named parameter groups (LoRA+), and the optimizer built on them.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at `ratio` times A's rate. Groups go by
module and leaf name, never by `ndim`: under ZeRO-3 every parameter looks one-dimensional.
"""

from __future__ import annotations

import torch
from torch import nn

from dschat.errors import UserError
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.module.token_rows import ROWS_NAME
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.predecessor import changed
from dschat.utils.printable import aligned
from dschat.utils.zero import full_numel

GROUPS = (
    *("decay", "no_decay", "lora_A", "lora_B", "lora_magnitude", "lora_embedding"),
    *("token_rows", "head"),
)
UNDECAYED = ("no_decay", "lora_magnitude", "token_rows")


def is_norm(module: nn.Module) -> bool:
    """Tell normalisation layers by type: torch's own, or any `...Norm` class."""
    torch_norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, torch_norms) or "norm" in type(module).__name__.lower()


def classify(module_name: str, module: nn.Module, leaf: str) -> str:
    """Name the group of the parameter `leaf` that sits directly on `module`."""
    for group in ("lora_A", "lora_B", "lora_magnitude", "lora_embedding"):
        if leaf.startswith(group):  # the adapter of a bare parameter p is lora_A_p, lora_B_p
            return "lora_embedding" if isinstance(module, nn.Embedding) else group
    if leaf == ROWS_NAME:
        return "token_rows"
    if "v_head" in module_name.split("."):
        return "head"
    return "no_decay" if leaf.endswith("bias") or is_norm(module) else "decay"


@changed(
    "get_optimizer_grouped_parameters(model, OptimizerConfig(learning_rate=1e-5))",
    config=OptimizerConfig,
)
def get_optimizer_grouped_parameters(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Put every trainable parameter into exactly one named group; leave empty groups out.

    Returns:
        Dicts `{"name", "params", "lr", "weight_decay"}` in the order of `GROUPS`.

    Raises:
        UserError: nothing is trainable.
    """
    members: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[classify(module_name, module, leaf)].append(parameter)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert seen == trainable, "a trainable parameter is in no group"
    if not trainable:
        raise UserError("no parameter is trainable: check lora_dim and the options that freeze")
    return [
        {
            "name": group,
            "params": parameters,
            "lr": config.rate(group),
            "weight_decay": config.weight_decay if group not in UNDECAYED else 0.0,
        }
        for group, parameters in members.items()
        if parameters
    ]


def build_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the groups; torch's fused kernels need no compiler, on GPU or CPU."""
    return torch.optim.AdamW(
        groups, lr=config.base_rate, betas=config.betas, eps=config.eps, fused=True
    )


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Map every named group to its present learning rate."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def check_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Raise an error unless lr_B / lr_A is the configured ratio on the optimizer as it stands.

    Raises:
        RuntimeError: something between the groups and the optimizer has changed a rate.
    """
    rates = {g["name"]: g.get("initial_lr", g["lr"]) for g in optimizer.param_groups}
    expected = {name: config.rate(name) for name in rates}
    wrong = {n: r for n, r in rates.items() if abs(r - expected[n]) > 1e-9 * expected[n]}
    if wrong:
        raise RuntimeError(f"learning rates {wrong} are not the configured {expected}")
    current = group_rates(optimizer)
    if current.get("lora_A", 0.0) > 0.0 and "lora_B" in current:
        ratio = current["lora_B"] / current["lora_A"]
        if abs(ratio - config.loraplus_lr_ratio) > 1e-6 * config.loraplus_lr_ratio:
            raise RuntimeError(
                f"lr_B / lr_A is {ratio:g}, not the configured {config.loraplus_lr_ratio:g}"
            )


def group_table(groups: list[dict], model: nn.Module, title: str) -> str:
    """Render the table of what trains: rate, weight decay and size by group, the share of all."""
    rows = [("group", "learning rate", "weight decay", "tensors", "parameters")]
    for group in groups:
        count = sum(full_numel(p) for p in group["params"])
        rate, decay = f"{group['lr']:.3g}", f"{group['weight_decay']:g}"
        rows.append((group["name"], rate, decay, str(len(group["params"])), f"{count:,}"))
    trainable = sum(full_numel(p) for g in groups for p in g["params"])
    packed = [m for m in model.modules() if isinstance(m, QuantizedLoRALinear)]
    total = sum(full_numel(p) for p in model.parameters()) + sum(m.weight_numel for m in packed)
    share = f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"
    rates = {group["name"]: group["lr"] for group in groups}
    if "lora_A" in rates and "lora_B" in rates:
        share += f"; B learns at {rates['lora_B'] / rates['lora_A']:g} times A's rate"
    return "\n".join([title, *aligned(rows), share])
