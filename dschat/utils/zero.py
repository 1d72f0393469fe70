"""The only file that knows ZeRO-3: full shapes, gathered parameters, consolidated state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn


class ShardedParameter(nn.Parameter):
    """A parameter that ZeRO-3 holds in shards; for type checkers alone."""

    ds_shape: torch.Size
    ds_tensor: torch.Tensor
    ds_secondary_tensor: torch.Tensor | None  # near shards
    ds_status: Enum
    ds_process_group: dist.ProcessGroup
    ds_active_sub_modules: set[int]
    partition: Callable[[], None]


def is_partitioned(parameter: torch.Tensor) -> TypeGuard[ShardedParameter]:
    """Return whether ZeRO-3 holds this parameter in shards; its own `shape` is then meaningless."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape before partitioning; under `zero.Init` `parameter.shape` is `(0,)`."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


def full_numel(parameter: torch.Tensor) -> int:
    """Return the number of elements before partitioning."""
    return full_shape(parameter).numel()


@contextlib.contextmanager
def gathered(
    parameters: Sequence[torch.Tensor], modifier_rank: int | None = None
) -> Iterator[None]:
    """Gather all shards inside the block; changes of the `modifier_rank` are spread on exit."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


@contextlib.contextmanager
def gathered_whole(engine: nn.Module) -> Iterator[None]:
    """Hold the complete weights of a ZeRO-3 engine inside the block: its passes gather nothing.

    Every rank enters and leaves; between the two they need not make the same passes. The weights
    must not change meanwhile.
    """
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    for parameter in engine.parameters():
        if is_partitioned(parameter):
            # A pass that stopped half-way leaves its marks, with which no shard can be let go.
            parameter.ds_active_sub_modules.clear()
    offload: Any = engine.optimizer.parameter_offload  # type: ignore[union-attr]
    # DeepSpeed leaves this hook, in which every pass of one rank waits for those of the others.
    hooks, place = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    waits = hooks.pop(place)
    try:
        with unwrap_model_for_generation(engine):
            yield
    finally:
        hooks[place] = waits


@contextlib.contextmanager
def init_context(ds_config: dict | None) -> Iterator[None]:
    """Let `from_pretrained` and `from_config` build models that ZeRO-3 has sharded already.

    With None, or a config of a lower stage, the block changes nothing.
    """
    stage = (ds_config or {}).get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        yield
        return
    from transformers.integrations import deepspeed as hf_deepspeed

    # transformers keeps only a weak reference: the object must live as long as the block.
    config = hf_deepspeed.HfDeepSpeedConfig(ds_config)
    try:
        with _one_group_of_near_shards():
            yield
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()
        del config


@contextlib.contextmanager
def _one_group_of_near_shards() -> Iterator[None]:
    """Let all models of a process have the group of `zero_hpz_partition_size` in common.

    DeepSpeed makes it for the first one, and for a second one stops because it is there.
    """
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group

    def once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            make(size)

    groups._create_zero_param_parallel_group = once
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = make


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Identify a tensor's storage and its place there, also on `meta`: equal for tied tensors."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this rank owns of the parameter: its shard under ZeRO-3, else all of it."""
    return parameter.ds_tensor.data if is_partitioned(parameter) else parameter.data


def local_values(parameter: torch.Tensor) -> torch.Tensor:
    """Return the elements that this rank owns; what fills a shard up at its end is left out."""
    shard = local_shard(parameter)
    if not is_partitioned(parameter):
        return shard
    before = dist.get_rank(parameter.ds_process_group) * shard.numel()
    return shard.flatten()[: max(0, full_numel(parameter) - before)]


def own_part(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Cut this rank's part, flat and filled up with zeros, out of all of a sharded parameter."""
    assert is_partitioned(parameter)
    size = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    part = full.new_zeros(size)
    own = full.flatten()[start : start + size]
    part[: own.numel()] = own
    return part


def set_local_shard(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite what this rank owns of the parameter; every rank must do so.

    ZeRO-3 keeps small parameters gathered between steps, and those gathered copies would outlive
    their shards: they are released, and gathered again where they are needed. So would a second
    shard, among the ranks of a machine.
    """
    local_shard(parameter).copy_(value)
    if is_partitioned(parameter):
        parameter.ds_secondary_tensor = None
    if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def consolidated_state_dict(
    module: nn.Module, rank: int, wanted: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Collect the complete state on rank 0 as CPU tensors, {} on other ranks; all ranks must call.

    With `wanted`, only the entries of these names are gathered. Tied parameters stay tied (one
    tensor under both names). Parameters are gathered one by one, so the peak is one parameter, not
    the model.
    """
    state: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor | None] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if wanted is not None and name not in wanted:
            continue
        if id(parameter) not in copies:
            with gathered([parameter]):
                on_cpu = parameter.detach().to("cpu", copy=True) if rank == 0 else None
                copies[id(parameter)] = on_cpu
        tensor = copies[id(parameter)]
        if tensor is not None:
            state[name] = tensor
    if rank == 0:
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in persistent and (wanted is None or name in wanted):
                state[name] = buffer.detach().to("cpu", copy=True)
    return state
