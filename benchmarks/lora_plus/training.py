"""One run of the LoRA+ grid: a model, rows to learn, a budget of steps, the loss at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dschat.data.batches import Batch, SFTBatch
from dschat.functional.losses import mean_scale
from dschat.models.logprobs import target_loss
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim import build_optimizer, get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory

WARMUP = 0.05  # share of the steps
CLIPPING = 1.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Losses:
    """A batch's summed loss, over how many tokens or pairs, and how many pairs are in order."""

    total: torch.Tensor
    count: int
    right: float | None = None


def answer_losses(model: nn.Module, batch: SFTBatch) -> Losses:
    """Loss of the answers' tokens."""
    # Without a padding mask: padding is on the right, where no real token looks.
    total = target_loss(model, {"input_ids": batch.input_ids}, batch.loss_mask)
    return Losses(total, int(batch.loss_mask.sum()))


@dataclass(frozen=True)
class Task:
    """The model that every run starts from (never trained itself) and the rows it is to learn."""

    name: str
    model: nn.Module
    train: list[Row]
    evaluation: Sequence[Batch]
    collator: Callable[[list[Row]], Batch]
    losses: Callable[[nn.Module, Any], Losses] = answer_losses


@dataclass(frozen=True)
class Run:
    """Everything that tells one run from another within one benchmark.

    `init` is the adapter matrix that starts random, or `full`: all weights train at `eta_A`.
    `alpha` is a multiple of the rank, so it is the adapters' scaling itself.
    """

    init: str
    eta_A: float
    eta_B: float
    seed: int
    steps: int
    alpha: float = 1.0
    eval_every: int = 0  # steps between evaluations; 0 evaluates at the end alone

    @property
    def ratio(self) -> float:
        """lambda = eta_B / eta_A."""
        return self.eta_B / self.eta_A


@dataclass(frozen=True)
class Outcome:
    """Evaluation losses per answer token or pair; `loss` is None where training diverged."""

    loss: float | None
    curve: tuple[tuple[int, float], ...]  # (steps done, evaluation loss), the last one included
    accuracy: float | None = None  # of pairs, at the end


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each step: every row once an epoch, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(rows, generator=generator).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


@torch.no_grad()
def evaluate(task: Task, model: nn.Module) -> tuple[float, float | None]:
    """Mean loss over all answer tokens or pairs, and the share of pairs in the right order."""
    found = [task.losses(model, batch) for batch in task.evaluation]
    count = sum(losses.count for losses in found)
    right = [losses.right for losses in found if losses.right is not None]
    total = sum(losses.total.item() for losses in found)
    return total / count, sum(right) / count if right else None


def train_once(task: Task, run: Run, rank: int, batch_size: int) -> Outcome:
    """One run from the task's model: adapters, or all weights where `run.init` is `full`."""
    torch.manual_seed(run.seed)
    model = copy.deepcopy(task.model)
    if run.init != "full":
        adapters = LoraConfig(lora_dim=rank, lora_alpha=run.alpha * rank, lora_init=run.init)
        convert_linear_layer_to_lora(model, adapters)
        only_optimize_lora_parameters(model)
    config = OptimizerConfig(run.eta_A, loraplus_lr_ratio=run.ratio)
    return fit(task, model, config, run, batch_size)


def fit(
    task: Task,
    model: nn.Module,
    config: OptimizerConfig,
    run: Run,
    batch_size: int,
) -> Outcome:
    """Train in place by the recipes' rules: AdamW, clipping, warm-up and cosine."""
    optimizer = build_optimizer(get_optimizer_grouped_parameters(model, config), config)
    warmup = max(1, round(WARMUP * run.steps))
    scheduler = schedule_factory("cosine", warmup, run.steps)(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    curve: list[tuple[int, float]] = []
    accuracy = None
    model.train()
    rows = batch_order(len(task.train), batch_size, run.steps, run.seed)
    for step, numbers in enumerate(rows, start=1):
        batch = task.collator([task.train[number] for number in numbers])
        losses = task.losses(model, batch)
        loss = losses.total * mean_scale(losses.count, world_size=1)
        if not math.isfinite(loss.item()):
            return Outcome(None, tuple(curve))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIPPING)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == run.steps or (run.eval_every and step % run.eval_every == 0):
            loss_now, accuracy = evaluate(task, model)
            curve.append((step, loss_now))
    final = curve[-1][1]
    return Outcome(final if math.isfinite(final) else None, tuple(curve), accuracy)
