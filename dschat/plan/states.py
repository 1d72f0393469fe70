"""Bytes that an engine holds for a model: by DeepSpeed's optimizer for its stage and dtype.

The optimizers differ in what they keep (read in DeepSpeed 0.19; a test holds the sums against the
bytes that engines allocate). P trained parameters, N ranks, w bytes of the dtype:

| | gradients | masters and moments | buckets |
| --- | --- | --- | --- |
| none (fp32, stage 0) | 4 P | 8 P | a copy to reduce |
| BF16 (bf16, stage 0 or 1, accumulation) | 4 P always, 2 P | 12 P / N | two copies to reduce |
| ZeRO 1 (all others of stage 0 or 1) | a P | 12 P / N | one |
| ZeRO 2 | a P / N | 12 P / N | two, they overlap |
| ZeRO 3 | a P / N always | 12 P / N | one, always; gathered layers |

a is the bytes that gradients add up in: 4 with bf16 and accumulation, else w. What is not there
always grows while a backward pass drops activations, so both ends of the pass are planned: the
first micro-batch of several leaves its gradients to the next. A step copies its part of the
gradients to fp32. `offload` takes masters and moments off the device, and their gradients; at
stage 3 the weights as well. With `zero_hpz_partition_size` the ranks of a machine keep a second
copy of the weights, in shards among themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.module.lora import is_adapter_key, lora_layers
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRALinear

WEIGHTS, ADAPTERS, GRADIENTS = "weights", "adapters", "gradients"
OPTIMIZER, BUCKETS = "optimizer", "buckets"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, MAX_LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
NEAR_SHARDS = "zero_hpz_partition_size"
# NF4 (QLoRA, sec. 3): a scale of a byte for each block of weights, a second one in fp32 for each
# block of scales; a layer keeps both tables of values, 16 and 256 in fp32, and an offset.
BLOCK, SCALES_BLOCK, TABLES = 64, 256, 4 * (16 + 256 + 1)

Bytes = dict[str, float]


def packed_bytes(layer: LoRALinear, bits: str) -> int:
    """Bytes of a linear layer's weight in few bits, with its scales."""
    elements = layer.in_features * layer.out_features
    if bits == "8bit":
        return elements + 4 * layer.out_features  # a scale for each row
    scales = math.ceil(elements / BLOCK)
    return math.ceil(elements / 2) + scales + 4 * math.ceil(scales / SCALES_BLOCK) + TABLES


def adapted_sizes(module: nn.Module) -> list[int]:
    """Elements of each weight that carries an adapter."""
    layers = lora_layers(module).values()
    return [layer.get_parameter(leaf).numel() for layer in layers for leaf in layer.adapted]


@dataclass(frozen=True)
class Counted:
    """Parameters of a model, tied ones once.

    Attributes:
        base: those that are no adapter's. trained: of all. largest: of the trained tensors.
        packed: weights kept in few bits. packed_bytes: theirs. unpacked: elements of the largest.
    """

    base: int
    adapters: int
    trained: int
    largest: int
    packed: int = 0
    packed_bytes: int = 0
    unpacked: int = 0

    @classmethod
    def of(cls, module: nn.Module, lora: LoraConfig) -> Counted:
        """Count a module with its adapters; `meta` will do."""
        named = list(module.named_parameters())
        adapters = sum(p.numel() for name, p in named if is_adapter_key(name))
        trained = [p.numel() for _, p in named if p.requires_grad]
        layers = lora_layers(module).values() if lora.quantize_base else ()
        packed = [layer for layer in layers if isinstance(layer, LoRALinear)]
        sizes = [layer.in_features * layer.out_features for layer in packed]
        return cls(
            base=sum(p.numel() for _, p in named) - adapters,
            adapters=adapters,
            trained=sum(trained),
            largest=max(trained, default=0),
            packed=sum(sizes),
            packed_bytes=sum(packed_bytes(layer, lora.quantize_base or "") for layer in packed),
            unpacked=max(sizes, default=0),
        )

    def weights(self, dtype: str) -> float:
        """Bytes of the base's weights."""
        return float((self.base - self.packed) * BYTES[dtype] + self.packed_bytes)


@dataclass(frozen=True)
class States:
    """Bytes on one rank, by kind.

    Attributes:
        held: always. at_start, at_end: beside that, as a backward pass begins and when it has all
            gradients. in_step: in the optimizer step.
    """

    held: Bytes
    at_start: Bytes = field(default_factory=dict)
    at_end: Bytes = field(default_factory=dict)
    in_step: Bytes = field(default_factory=dict)


def near_shards(config: EngineConfig, ranks: int) -> int:
    """Number of ranks among which ZeRO-3 gathers weights: those of a machine, or all."""
    near: int = get_train_ds_config(config, ranks)["zero_optimization"].get(NEAR_SHARDS, 1)
    return min(near, ranks) if near > 1 else ranks


def frozen_states(counted: Counted, dtype: str, ranks: int, *, sharded: bool) -> States:
    """Bytes of a model that only scores: its weights, of which ZeRO-3 gathers layers."""
    weights = counted.weights(dtype) / (ranks if sharded else 1)
    gathered = min(counted.base, MAX_LIVE) * BYTES[dtype] if sharded and ranks > 1 else 0.0
    return States({WEIGHTS: weights, BUCKETS: gathered})


def engine_states(counted: Counted, config: EngineConfig, ranks: int) -> States:
    """Bytes of a model that trains; the user's DeepSpeed JSON is read, where there is one."""
    ds: dict[str, Any] = get_train_ds_config(config, ranks, counted.trained)
    zero = ds["zero_optimization"]
    stage, offloads = zero["stage"], "offload_optimizer" in zero
    size, trained = BYTES[config.dtype], counted.trained
    share, sharded = ranks if stage else 1, ranks if stage == 3 else 1
    adds_fp32 = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    held = {
        WEIGHTS: counted.weights(config.dtype) / sharded,
        ADAPTERS: counted.adapters * size / sharded,
        OPTIMIZER: 0.0 if offloads else trained * (12 if stage else 8) / share,
    }
    if stage == 3:
        return _sharded(counted, zero, held, size, 4 if adds_fp32 else size, ranks)
    copied = min(trained, REDUCE_BUCKET)
    if stage == 0:
        return _unsharded(held, {GRADIENTS: trained * size}, {BUCKETS: copied * size}, config)
    if stage == 1 and adds_fp32 and not offloads:
        held[GRADIENTS] = 4.0 * trained
        return _unsharded(held, {GRADIENTS: trained * size}, {BUCKETS: copied * (4 + size)}, config)
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    buckets = {BUCKETS: bucket * size * (2.0 if stage == 2 and zero.get("overlap_comm") else 1.0)}
    summed = 4 if adds_fp32 else size
    gradients = trained * summed / (share if stage == 2 else 1)
    if offloads:  # passed to the host one at a time
        held[GRADIENTS] = float(counted.largest * size)
    if stage == 2 and offloads and summed == size:
        gradients = 0.0  # else they add up in fp32 on the device
    before = gradients if config.gradient_accumulation_steps > 1 else 0.0
    if stage == 2 and before and not offloads and summed == size:
        # Beside the sum of the passes before, this pass's own part, once a bucket is full.
        own = trained * size / share
        before, gradients = before + (own if trained > bucket else 0.0), gradients + own
    # The part that a rank has, that part in one piece, and the same in fp32.
    copies = 2 * summed + (4 if summed != 4 else 0)
    step = {} if offloads else {GRADIENTS: copies * trained / share}
    return States(held, {GRADIENTS: before} | buckets, {GRADIENTS: gradients} | buckets, step)


def _unsharded(held: Bytes, gradients: Bytes, copies: Bytes, config: EngineConfig) -> States:
    """Gradients of all parameters on every rank, reduced in copies once all are there."""
    before = gradients if config.gradient_accumulation_steps > 1 else {}
    return States(held, before, gradients | copies)


def _sharded(
    counted: Counted, zero: dict[str, Any], held: Bytes, size: int, summed: int, ranks: int
) -> States:
    """ZeRO-3."""
    everything, trained = counted.base + counted.adapters, counted.trained
    gathers = ranks > 1 or "offload_param" in zero
    live = min(everything, zero.get("stage3_max_live_parameters", MAX_LIVE)) if gathers else 0
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
    held[BUCKETS] = float((bucket + live) * size)
    if (near := min(zero.get(NEAR_SHARDS, 1), ranks)) > 1:
        held[WEIGHTS] += counted.base * size / near
        held[ADAPTERS] += counted.adapters * size / near
    if "offload_param" in zero:
        held[WEIGHTS] = held[ADAPTERS] = 0.0
    if "offload_optimizer" in zero:
        return States(held)
    held[GRADIENTS] = trained * summed / ranks
    at_once = min(trained / ranks, zero.get("sub_group_size", SUB_GROUP))
    return States(held, in_step={GRADIENTS: 4.0 * at_once})
