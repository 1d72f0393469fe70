"""Checksums of weights by content, the same on every device and in every way of sharding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dschat.utils.module.lora import is_adapter_key
from dschat.utils.zero import full_shape, gathered


def frozen_checksum(module: nn.Module) -> str:
    """SHA-256 over the configuration, names and shapes of all parameters, and frozen contents.

    Integer buffers count as frozen: weights packed in few bits are such. A content enters as the
    exact sum of its bit patterns, each times an odd number of its own: one changed element changes
    it, and so does another order of elements. It is the same on every device. Under ZeRO-3 a
    collective call.
    """
    return _checksum(module, {n: not p.requires_grad for n, p in module.named_parameters()})


def base_checksum(module: nn.Module) -> str:
    """SHA-256 over the configuration and all contents but those of adapters, likewise.

    It is that of the model before adapters were added, whatever trains.
    """
    names = [name for name, _ in module.named_parameters()]
    return _checksum(module, {name: True for name in names if not is_adapter_key(name)})


def _checksum(module: nn.Module, read: Mapping[str, bool]) -> str:
    """Checksum over these parameters: names and shapes, and contents where `read` is True."""
    total = hashlib.sha256(_configuration(module).encode())
    for name, parameter in module.named_parameters():
        if name not in read:
            continue
        content = 0
        if read[name]:
            with gathered([parameter]):
                content = _weighted_bits(parameter.detach())
        total.update(repr((name, [*full_shape(parameter)], content)).encode())
    for name, buffer in module.named_buffers():
        if not buffer.is_floating_point():
            total.update(repr((name, [*buffer.shape], _weighted_bits(buffer))).encode())
    return total.hexdigest()


def _configuration(module: nn.Module) -> str:
    """The model's configuration without paths and versions, as JSON."""
    config = getattr(module, "config", None)
    content = {} if config is None else _without_origin(config.to_dict())
    return json.dumps(content, sort_keys=True, default=str)


def _without_origin(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    own = {k: v for k, v in value.items() if not str(k).startswith("_")}
    return {str(k): _without_origin(v) for k, v in own.items() if k != "transformers_version"}


# Elements that are widened to 64 bits at once: what a core's cache holds, and what fills a device.
_CHUNK_ON_CPU, _CHUNK = 2**17, 2**22
# Two to the 64 by the golden ratio: of its multiples modulo 2**64 no two near ones are alike.
_GOLDEN = -7046029254386353131


def _weighted_bits(tensor: torch.Tensor) -> int:
    """Sum of bit patterns times odd numbers that are spread over 64 bits, modulo 2**64.

    The number at place i is i times the golden one, made odd.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.reshape(-1).view(integer[tensor.element_size()])
    size = _CHUNK_ON_CPU if bits.device.type == "cpu" else _CHUNK
    size = max(1, min(size, bits.numel()))
    first = torch.arange(size, device=bits.device).mul_(_GOLDEN)
    products = torch.empty_like(first)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), size):
        chunk = bits[start : start + size]
        here = products[: chunk.numel()]
        torch.add(first[: chunk.numel()], _wrapped(start * _GOLDEN), out=here)
        total += here.bitwise_or_(1).mul_(chunk).sum()
    return int(total.item()) % 2**64


def _wrapped(number: int) -> int:
    """A number modulo 2**64 as a signed one of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
