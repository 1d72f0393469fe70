"""Named parameter groups (LoRA+), the optimizer built on them, and its schedule.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at `ratio` times A's rate. Groups go by
module and leaf name, never by `ndim`: under ZeRO-3 every parameter looks one-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.module.token_rows import ROWS_NAME
from dschat.utils.predecessor import changed
from dschat.utils.zero import full_numel

GROUPS = (
    *("decay", "no_decay", "lora_A", "lora_B", "lora_magnitude", "lora_embedding"),
    *("token_rows", "head"),
)
UNDECAYED = ("no_decay", "lora_magnitude", "token_rows")

FIRST_RATIO = 16.0  # lambda that the LoRA+ authors try first
# Adapters start from two to three times the rate of full fine-tuning: A and B at one rate, or,
# under a ratio, the geometric mean of their two (docs/lora_plus.md has the measurements).
FULL_TO_LORA_RATE = 3.0


def first_lora_rate(full_rate: float, ratio: float, factor: float = FULL_TO_LORA_RATE) -> float:
    """First learning rate of A to try: `factor` times full fine-tuning's over the ratio's root."""
    return factor * full_rate / math.sqrt(ratio)


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Learning rates of every parameter group, weight decay, and AdamW's constants.

    Attributes:
        full_rate: learning rate that suits training all weights in this step, of a model of
            `full_rate_size` parameters; adapters take `full_to_lora` times as much. No flags.
    """

    learning_rate: float | None = setting(
        None,
        "learning rate of all that trains (default: {full_rate:g}, of adapters another)",
        above=0,
        may_change=True,
    )
    weight_decay: float = setting(
        0.0, "weight decay, except on biases and normalisation", at_least=0
    )
    lora_learning_rate: float | None = setting(
        None,
        "learning rate of A (default: the learning rate given, else what suits the ratio)",
        above=0,
        may_change=True,
    )
    loraplus_lr_ratio: float = setting(
        FIRST_RATIO, "LoRA+: learning rate of B over that of A", above=0, may_change=True
    )
    lora_embedding_learning_rate: float = setting(
        1e-6, "learning rate of adapters on embeddings", above=0, may_change=True
    )
    trainable_tokens_learning_rate: float | None = setting(
        None,
        "learning rate of the rows of --trainable_tokens (default: that of B)",
        above=0,
        may_change=True,
    )
    head_learning_rate: float | None = setting(
        None,
        "learning rate of a reward or value head (default: the learning rate)",
        above=0,
        may_change=True,
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    full_rate: float = 1e-5
    full_rate_size: float = 1.3e9
    full_to_lora: float = FULL_TO_LORA_RATE

    @property
    def base_rate(self) -> float:
        """Learning rate of everything but adapters and heads with rates of their own."""
        return self.full_rate if self.learning_rate is None else self.learning_rate

    @property
    def lora_A_rate(self) -> float:
        """eta_A: the adapters' own rate, else the rate given, else what suits the ratio."""
        first = first_lora_rate(self.full_rate, self.loraplus_lr_ratio, self.full_to_lora)
        return self.lora_learning_rate or self.learning_rate or first

    @property
    def token_rows_rate(self) -> float:
        """Learning rate of single rows of embedding and head."""
        default = self.loraplus_lr_ratio * self.lora_A_rate
        return self.trainable_tokens_learning_rate or default

    def rate(self, group: str) -> float:
        """Learning rate of a named group."""
        return {
            "lora_A": self.lora_A_rate,
            "lora_B": self.loraplus_lr_ratio * self.lora_A_rate,
            "lora_magnitude": self.lora_A_rate,
            "lora_embedding": self.lora_embedding_learning_rate,
            "token_rows": self.token_rows_rate,
            "head": self.head_learning_rate or self.base_rate,
        }.get(group, self.base_rate)


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


SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
POLYNOMIAL_END = 1e-7  # a rate, as transformers has it


def schedule_factory(
    name: str, num_warmup_steps: int, num_training_steps: int
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Make a function that builds the schedule; DeepSpeed calls it on the groups that survive.

    Steps are optimizer steps. Every group keeps its own rate times one common factor. The names
    and shapes are those of `transformers.get_scheduler`, up to rounding, without its import;
    restarts are one cycle, the polynomial is of degree 1.
    """
    if name not in SCHEDULES:
        raise UserError(f"lr_scheduler_type is {name!r}: choose one of {', '.join(SCHEDULES)}")
    decay_steps = max(num_training_steps - num_warmup_steps, 1)

    def build(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        end = POLYNOMIAL_END / optimizer.defaults["lr"] if name == "polynomial" else 0.0

        def factor(step: int) -> float:
            if name == "constant":
                return 1.0
            if step < num_warmup_steps:
                return step / num_warmup_steps
            if name == "constant_with_warmup":
                return 1.0
            left = 1.0 - min((step - num_warmup_steps) / decay_steps, 1.0)
            if name.startswith("cosine"):
                return 0.5 * (1.0 - math.cos(math.pi * left))
            return end + (1.0 - end) * left

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    return build


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Map every named group to its present learning rate."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def check_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Stop unless lr_B / lr_A is the configured ratio on the optimizer as it stands.

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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    trainable = sum(full_numel(p) for g in groups for p in g["params"])
    packed = [m for m in model.modules() if isinstance(m, QuantizedLoRALinear)]
    total = sum(full_numel(p) for p in model.parameters()) + sum(m.weight_numel for m in packed)
    share = f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"
    rates = {group["name"]: group["lr"] for group in groups}
    if "lora_A" in rates and "lora_B" in rates:
        share += f"; B learns at {rates['lora_B'] / rates['lora_A']:g} times A's rate"
    return "\n".join([title, *lines, share])
