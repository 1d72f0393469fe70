"""Bytes that an engine holds for a model: by DeepSpeed's optimizer for its stage and dtype.

The four optimizers differ in what they keep (read in DeepSpeed 0.19; a test holds the sums against
the bytes that engines allocate). P trained parameters, N ranks, w bytes of the dtype:

| | gradients | masters and moments | buckets |
| --- | --- | --- | --- |
| none (fp32, stage 0) | 4 P in backward | 8 P | a copy to reduce, with several ranks |
| BF16 (bf16, stage 0 or 1, accumulation) | 4 P, held | 12 P / N | none |
| ZeRO 1 (all others of stage 0 or 1) | w P in backward | 12 P / N | one |
| ZeRO 2 | a P / N in backward | 12 P / N | two, they overlap |
| ZeRO 3 | a P / N, held | 12 P / N | one, held; gathered layers |

a is the bytes that gradients add up in: 4 with bf16 and accumulation, else w. A step copies its
part of the gradients to fp32. `offload` takes masters and moments off the device, and their
gradients; at stage 3 the weights as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.module.lora import is_adapter_key, lora_layers
from dschat.utils.module.lora_config import LoraConfig

WEIGHTS, ADAPTERS, GRADIENTS = "weights", "adapters", "gradients"
OPTIMIZER, BUCKETS = "optimizer", "buckets"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, MAX_LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# Bytes of a packed weight: 4bit NF4 with doubly quantised scales of blocks of 64 (QLoRA, sec. 3);
# 8bit a scale of four bytes for a row.
PACKED = {"4bit": 0.5 + (8 + 32 / 256) / 8 / 64, "8bit": 1.0}

Bytes = dict[str, float]


@dataclass(frozen=True)
class Counted:
    """Parameters of a model, tied ones once.

    Attributes:
        base: those that are no adapter's. trained: of all. packed: weights kept in `bits`.
        largest: of the trained tensors. unpacked: elements of the largest packed one.
    """

    base: int
    adapters: int
    trained: int
    largest: int
    packed: int = 0
    unpacked: int = 0
    bits: str | None = None

    @classmethod
    def of(cls, module: nn.Module, lora: LoraConfig) -> Counted:
        """Count a module with its adapters; `meta` will do."""
        named = list(module.named_parameters())
        adapters = sum(p.numel() for name, p in named if is_adapter_key(name))
        trained = [p.numel() for _, p in named if p.requires_grad]
        sizes = []
        if lora.quantize_base is not None:
            layers = lora_layers(module).values()
            sizes = [layer.get_parameter(leaf).numel() for layer in layers for leaf in layer.adapted]
        return cls(
            base=sum(p.numel() for _, p in named) - adapters,
            adapters=adapters,
            trained=sum(trained),
            largest=max(trained, default=0),
            packed=sum(sizes),
            unpacked=max(sizes, default=0),
            bits=lora.quantize_base,
        )

    def weights(self, dtype: str) -> float:
        """Bytes of the base's weights."""
        packed = self.packed * PACKED[self.bits] if self.bits else 0.0
        return (self.base - self.packed) * BYTES[dtype] + packed


@dataclass(frozen=True)
class States:
    """Bytes on one rank, by kind: always, in a backward pass beside that, in an optimizer step."""

    held: Bytes
    in_backward: Bytes = field(default_factory=dict)
    in_step: Bytes = field(default_factory=dict)


def frozen_states(counted: Counted, dtype: str, ranks: int, *, sharded: bool) -> States:
    """Bytes of a model that only scores: its weights, of which ZeRO-3 gathers layers."""
    weights = counted.weights(dtype) / (ranks if sharded else 1)
    gathered = min(counted.base, MAX_LIVE) * BYTES[dtype] if sharded and ranks > 1 else 0.0
    return States({WEIGHTS: weights, BUCKETS: gathered})


def engine_states(counted: Counted, config: EngineConfig, ranks: int) -> States:
    """Bytes of a model that trains; the user's DeepSpeed JSON is read, where there is one."""
    ds: dict[str, Any] = get_train_ds_config(config, ranks)
    zero, stage = ds["zero_optimization"], ds["zero_optimization"]["stage"]
    size, trained = BYTES[config.dtype], counted.trained
    share = ranks if stage else 1
    sharded = ranks if stage == 3 else 1
    adds_fp32 = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    summed = 4 if adds_fp32 else size
    offloads = "offload_optimizer" in zero
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET) * size
    held = {
        WEIGHTS: counted.weights(config.dtype) / sharded,
        ADAPTERS: counted.adapters * size / sharded,
        OPTIMIZER: 0.0 if offloads else trained * (12 if stage else 8) / share,
    }
    backward: Bytes = {}
    copy = {} if offloads else {GRADIENTS: 4.0 * trained / share}
    if stage == 0:
        copies = min(trained, REDUCE_BUCKET) * size if ranks > 1 else 0
        return States(held, {GRADIENTS: trained * size, BUCKETS: copies}, {})
    if stage == 1 and adds_fp32 and not offloads:
        return States(held | {GRADIENTS: 4.0 * trained}, {}, {})
    if stage == 1:
        backward = {GRADIENTS: trained * size, BUCKETS: bucket}
    elif stage == 2:
        part = counted.largest * size if offloads else trained * summed / share
        backward = {GRADIENTS: part, BUCKETS: bucket * (2 if zero.get("overlap_comm") else 1)}
    else:
        live = min(counted.base + counted.adapters, zero.get("stage3_max_live_parameters", MAX_LIVE))
        held[BUCKETS] = bucket + (live * size if ranks > 1 or "offload_param" in zero else 0)
        if "offload_param" in zero:
            held[WEIGHTS] = held[ADAPTERS] = 0.0
        if not offloads:
            held[GRADIENTS] = trained * summed / share
            copy = {GRADIENTS: 4.0 * min(trained / share, zero.get("sub_group_size", SUB_GROUP))}
        return States(held, {}, copy)
    kept = {} if offloads else {GRADIENTS: trained * summed / share}
    return States(held, backward, {k: copy.get(k, 0) + kept.get(k, 0) for k in copy})
