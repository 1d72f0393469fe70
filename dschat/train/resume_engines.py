"""Checks that engines continue a checkpoint: their parameter groups, frozen weights and rates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dschat.errors import UserError
from dschat.utils.optim import check_rates, get_optimizer_grouped_parameters, group_rates
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.zero import full_shape


def named_groups(module: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, list[int]]]:
    """Map each parameter group to the names and shapes in it, in the optimizer's order."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        group["name"]: {names[id(p)]: [*full_shape(p)] for p in group["params"]}
        for group in get_optimizer_grouped_parameters(module, config)
    }


def check_same_groups(
    place: str, name: str, saved: Mapping[str, float], optimizer: torch.optim.Optimizer
) -> None:
    """Check that the optimizer has the parameter groups that were saved, in their order."""
    present = list(group_rates(optimizer))
    if list(saved) != present:
        raise UserError(
            f"resume {place}: the {name} was saved with parameter groups {', '.join(saved)}, now "
            f"there are {', '.join(present)}; nothing overrides it, train what was trained"
        )


def check_same_frozen(place: str, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Check that the weights that no checkpoint holds are those of the first start."""
    for name in sorted({*saved, *present}):
        if saved.get(name) != present.get(name):
            raise UserError(
                f"resume {place}: the {name}'s frozen weights, or its architecture, are not those "
                "that the run began with; give the same model folder"
            )


def set_peak_rates(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    config: OptimizerConfig,
) -> None:
    """Set every group to its configured peak rate, at the present point of the schedule."""
    for i, group in enumerate(optimizer.param_groups):
        peak = config.rate(group["name"])
        group["initial_lr"] = schedule.base_lrs[i] = peak
        group["lr"] = peak * schedule.lr_lambdas[i](schedule.last_epoch)


def check_restored_rates(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    config: OptimizerConfig,
) -> None:
    """Check that rates are the configured ones, now and in the schedule's steps to come.

    Raises:
        RuntimeError: loading has brought other rates back.
    """
    check_rates(optimizer, config)
    for group, peak in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        if peak != group["initial_lr"]:
            raise RuntimeError(
                f"the schedule would set {group['name']} by a peak of {peak:g}, not by the "
                f"configured {group['initial_lr']:g}"
            )
