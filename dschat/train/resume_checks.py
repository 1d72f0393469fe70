"""What is checked, and may be set anew, in an engine that a training state has been loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from dschat.errors import UserError
from dschat.utils.optim import OptimizerConfig, check_rates, group_rates
from dschat.utils.zero import full_shape, gathered

Schedule = torch.optim.lr_scheduler.LambdaLR


def check_groups(
    place: str, name: str, saved: Mapping[str, float], optimizer: torch.optim.Optimizer
) -> None:
    """Stop unless the optimizer has the groups that were saved, in their order."""
    present = list(group_rates(optimizer))
    if list(saved) != present:
        raise UserError(
            f"resume {place}: the {name} was saved with parameter groups {', '.join(saved)}, now "
            f"there are {', '.join(present)}; nothing overrides it, train what was trained"
        )


def check_frozen(place: str, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Stop unless the weights that no state holds are those of the first start."""
    for name in sorted({*saved, *present}):
        if saved.get(name) != present.get(name):
            raise UserError(
                f"resume {place}: the {name}'s frozen weights, or its architecture, are not those "
                "that the run began with; give the same model folder"
            )


def frozen_checksum(module: nn.Module) -> str:
    """SHA-256 over names and shapes of all parameters, and the contents of the frozen ones.

    Buffers of whole numbers count as frozen: weights packed in few bits are such. A content enters
    as the exact sum of its bit patterns, which neither the device nor the order of summation
    changes. Under ZeRO-3 a collective call.
    """
    total = hashlib.sha256()
    for name, parameter in module.named_parameters():
        content = 0
        if not parameter.requires_grad:
            with gathered([parameter]):
                content = _sum_of_bits(parameter.detach())
        total.update(repr((name, [*full_shape(parameter)], content)).encode())
    for name, buffer in module.named_buffers():
        if not buffer.is_floating_point():
            total.update(repr((name, [*buffer.shape], _sum_of_bits(buffer))).encode())
    return total.hexdigest()


def _sum_of_bits(tensor: torch.Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(whole[tensor.element_size()]).sum(dtype=torch.int64).item()


def set_rates(
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    config: OptimizerConfig,
) -> None:
    """Give every group its configured peak rate, at the present point of the schedule."""
    for i, group in enumerate(optimizer.param_groups):
        peak = config.rate(group["name"])
        group["initial_lr"] = schedule.base_lrs[i] = peak
        group["lr"] = peak * schedule.lr_lambdas[i](schedule.last_epoch)


def check_restored_rates(
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    config: OptimizerConfig,
) -> None:
    """Stop unless rates are the configured ones, now and in the schedule's steps to come.

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
