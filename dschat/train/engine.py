"""A model and its configs in, a DeepSpeed engine with named parameter groups out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dschat.errors import UserError, brief
from dschat.train.advice import lora_advice
from dschat.train.finite import GradientWatch
from dschat.train.memory_use import note_engine
from dschat.train.model_config import ModelConfig
from dschat.train.optimizer_block import complete_optimizer_block
from dschat.train.overflow import limit_skips
from dschat.utils.distributed import print_rank_0
from dschat.utils.ds_utils import (
    EngineConfig,
    get_eval_ds_config,
    get_train_ds_config,
)
from dschat.utils.module.targets import left_without_adapter
from dschat.utils.optim import (
    build_optimizer,
    check_rates,
    get_optimizer_grouped_parameters,
    group_table,
)
from dschat.utils.places import waiting
from dschat.utils.schedules import Schedule
from dschat.utils.zero import full_numel


class Engine(nn.Module):
    """DeepSpeed's training engine, as much of it as is used here; for type checkers alone."""

    module: nn.Module  # the model inside
    device: torch.device
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    gradient_accumulation_steps: Callable[[], int]
    set_gradient_accumulation_boundary: Callable[[bool], None]
    backward: Callable[..., None]
    step: Callable[[], None]
    was_step_applied: Callable[[], bool]  # False where fp16 skipped an overflow
    global_steps: int  # since the run's beginning, those that were skipped included
    skipped_steps: int  # since the run's beginning
    fp16_enabled: Callable[[], bool]
    get_global_grad_norm: Callable[[], float | None]  # before clipping; None before the first step
    save_checkpoint: Callable[..., bool]
    module_state_dict: Callable[..., dict[str, torch.Tensor]]  # what a checkpoint holds of it
    load_checkpoint: Callable[..., tuple[str | None, dict[str, object]]]
    checkpoint_engine: Any  # reads and writes the files of a checkpoint
    gradients: GradientWatch | None  # None in fp16, where those that overflow are no fault
    _copy_recovery_script: Callable[[str], None]  # puts DeepSpeed's zero_to_fp32.py beside them


def resolve_dtype(name: str) -> str:
    """Turn `auto` into bf16 where the device computes in it, else into fp32; check the others.

    Raises:
        UserError: the device cannot train in this dtype.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device = accelerator.device_name()
    if device == "cpu":
        # Without AMX, bf16 is emulated: correct, and slower than fp32.
        has_bf16, has_fp16 = bool(torch.cpu.get_capabilities().get("amx_tile")), False
    elif device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        has_fp16 = True
    else:
        has_bf16, has_fp16 = accelerator.is_bf16_supported(), accelerator.is_fp16_supported()
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    if name == "fp16" and not has_fp16:
        raise UserError(f"dtype fp16 cannot train on {device}: use bf16 or fp32")
    if name == "bf16" and not has_bf16 and device != "cpu":
        raise UserError(f"dtype bf16 is not supported by this {device}: use fp16 or fp32")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Look up torch's dtype of fp32, bf16 or fp16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def build_engine(
    module: nn.Module,
    config: EngineConfig,
    model: ModelConfig,
    schedule: Schedule,
    world_size: int,
    title: str,
) -> Engine:
    """Add adapters, freeze, and initialise DeepSpeed; print the table of what trains.

    An optimizer block in the user's JSON applies to the same parameter groups; otherwise AdamW.

    Returns:
        The engine, with `engine.lr_scheduler` set and every group's rate checked.
    """
    import deepspeed

    parameters = sum(full_numel(p) for p in module.parameters())
    model.apply(module)
    optimizer_config = model.optimizer
    groups = get_optimizer_grouped_parameters(module, optimizer_config)
    advice = lora_advice(model.lora, optimizer_config, config, world_size, parameters)
    left = left_without_adapter(module, model.lora)
    print_rank_0("\n".join([group_table(groups, module, title), *left, *advice]))
    trained = sum(full_numel(p) for group in groups for p in group["params"])
    ds_config = get_train_ds_config(config, world_size, trained)
    own_optimizer = "optimizer" not in ds_config
    if not own_optimizer:
        complete_optimizer_block(ds_config["optimizer"], optimizer_config, config.deepspeed_config)
    # DeepSpeed's bf16 optimizer prints its memory use at every step of its set-up.
    with contextlib.redirect_stdout(io.StringIO()), refusals_named(config.deepspeed_config):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, optimizer_config) if own_optimizer else None,
            model_parameters=None if own_optimizer else groups,
            lr_scheduler=schedule,
            config=ds_config,
            dist_init_required=False,
        )
    check_rates(engine.optimizer, optimizer_config)
    engine.gradients = None if config.dtype == "fp16" else GradientWatch(engine.module)
    if config.dtype == "fp16":
        limit_skips(engine, config.max_skipped_steps, title)
    role = title.partition(", ")[2]
    note_engine(role, config.micro_batch_size, model.gradient_checkpointing)
    engine.train()  # models load in eval mode, where dropout and checkpointing are off
    return engine


@contextlib.contextmanager
def refusals_named(deepspeed_config: str | None) -> Iterator[None]:
    """Turn what DeepSpeed refuses while it makes an engine into one line on the user's JSON.

    Raises:
        UserError: it refuses something, and there is a JSON.
    """
    try:
        yield
    except (AssertionError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        if deepspeed_config is None or isinstance(error, UserError):
            raise
        reason = brief(error, with_type=True)
        raise UserError(f"deepspeed_config {deepspeed_config}: DeepSpeed: {reason}") from error


def build_frozen(
    module: nn.Module, dtype: str, device: torch.device, *, sharded: bool, offload: bool = False
) -> nn.Module:
    """Prepare a module that is only ever scored: on the device, or `sharded` by ZeRO-3.

    With `offload` its weights stay on the CPU; the caller moves them in for a pass (ZeRO-3 does so
    by itself, layer by layer).
    """
    module.requires_grad_(False).eval()
    if not sharded:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch_dtype(dtype))
        # Not the buffers: an engine keeps them as they were loaded (rotary frequencies in fp32).
        return module.to("cpu" if offload else device)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, config=get_eval_ds_config(dtype, offload), dist_init_required=False
    )
    return engine.module


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    """Accumulate one micro-batch's gradients; reduce them with the accumulation group's last.

    The loss must already be divided by the count of the group (`losses.mean_scale`).
    """
    engine.set_gradient_accumulation_boundary(last)
    with waiting("the gradient all-reduce" if last else "a backward pass"):
        engine.backward(loss, scale_wrt_gas=False)
