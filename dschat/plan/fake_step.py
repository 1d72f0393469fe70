"""Bytes that a step's passes need beside weights: the real model runs on fake tensors.

Nothing is computed and nothing allocated: a fake tensor has a shape, a dtype and a storage, and the
model's own code makes the same tensors, keeps the same ones for its backward pass and drops them at
the same places. A few layers of each kind run (`layers.py`). All layers of a kind keep the same
between forward and backward, so the others add what the last one kept; that is exact as long as the
peak lies where all layers' tensors are alive, which is at the head or in the backward pass of the
last layer (a test holds it against models of all their layers).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, masking_utils

from dschat.errors import UserError
from dschat.models.causal_lm import disable_dropout
from dschat.models.head import assume_split
from dschat.models.right_padding import assume_causal
from dschat.plan.counting import Allocations
from dschat.plan.layers import Layers, decoder_layers, layers_to_run
from dschat.plan.passes import Pass
from dschat.train.model_config import ModelConfig

ACTIVATIONS, LOGITS = "activations", "logits"
MOST_TOKENS = 2**24  # of a pass; the states of a layer of width 1,024 are 32 GiB then, in bf16


@dataclass(frozen=True)
class Shape:
    """A model to plan for: its config, and what builds it.

    Attributes:
        is_policy: dropout is off, as PPO has it.
    """

    config: PretrainedConfig
    build: Callable[[PretrainedConfig], nn.Module]
    model: ModelConfig
    dtype: torch.dtype
    is_policy: bool = False

    @property
    def key(self) -> tuple:
        """Equal for shapes whose passes need the same."""
        config = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        name = getattr(self.build, "__qualname__", "")
        return config, name, repr(self.model), str(self.dtype), self.is_policy


@dataclass(frozen=True)
class Needed:
    """Bytes that a pass needs at its peak, by kind, and what it leaves when it has ended."""

    at_peak: dict[str, float]
    left: float = 0.0

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.at_peak.values())


_FOUND: dict[tuple, Needed] = {}
_LAYERS: dict[tuple, Layers] = {}


def needed(shape: Shape, wanted: Pass) -> Needed:
    """Find what a pass needs; once for each shape and pass of a process.

    Raises:
        UserError: a pass so large that not even its head's blocks are counted in time.
    """
    if wanted.rows * wanted.length > MOST_TOKENS:
        raise UserError(
            f"{wanted.rows:,} rows of {wanted.length:,} tokens in one pass are more than a device "
            "holds; lower the batch size"
        )
    key = (*shape.key, *wanted.key, wanted.rows, wanted.length)
    if key not in _FOUND:
        _FOUND[key] = _run(shape, wanted)
    return _FOUND[key]


def _run(shape: Shape, wanted: Pass) -> Needed:
    """Run a pass on some layers of each kind, and add what the others need."""
    layers = _layers(shape)
    module = without_weights(replace(shape, config=layers.config)).train(wanted.trains)
    assume_split(module)
    assume_causal(module)
    vocabulary = shape.config.get_text_config().vocab_size
    with FakeTensorMode():
        _give_fake_weights(module)
        ids = torch.zeros(wanted.rows, wanted.length, dtype=torch.long)
        mask = torch.ones_like(ids, dtype=torch.bool)
        counted = Allocations(
            [*module.parameters(), *module.buffers(), ids, mask], _kind_of(vocabulary)
        )
        alive_after = _alive_after_layers(module, layers.config, counted)
        _drop_gradients(module)
        grad = torch.set_grad_enabled(wanted.trains)
        with counted, WorstCase(), _unpacked_rows(), grad:
            made = wanted.run(module, ids, mask)
            left = counted.live
            if wanted.trains:
                made.backward()
    at_peak = {ACTIVATIONS: 0.0, LOGITS: 0.0} | counted.at_peak
    others = 0.0  # kept by layers that did not run: each as much as the last one of its kind
    for kind, count in (layers.counts - Counter(layers.running)).items():
        last = len(layers.running) - 1 - layers.running[::-1].index(kind)
        others += count * (alive_after[last] - alive_after[last - 1])
    at_peak[ACTIVATIONS] += others
    return Needed(at_peak, left + others)


def _layers(shape: Shape) -> Layers:
    """Layers that run; chosen once for each config and kind of model."""
    key = shape.key[:2]
    if key not in _LAYERS:
        _LAYERS[key] = layers_to_run(shape.config, shape.build)
    return _LAYERS[key]


def without_weights(shape: Shape) -> nn.Module:
    """Build the model on `meta` as its step trains it: adapters, what is frozen, checkpointing."""
    config = copy.deepcopy(shape.config)
    for part in (config, config.get_text_config()):
        part.dtype = shape.dtype
    with torch.device("meta"):
        module = shape.build(config)
    shape.model.apply_on_meta(module)
    if shape.is_policy:
        disable_dropout(module)
    return module


def _give_fake_weights(module: nn.Module) -> None:
    """Put tensors that look like a device's in place of those on `meta`; ties stay ties."""
    made: dict[int, torch.Tensor] = {}

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = on_device(tensor)  # type: ignore[assignment]


def _kind_of(vocabulary: int) -> Callable[[torch.Tensor], str]:
    def kind(tensor: torch.Tensor) -> str:
        return LOGITS if tensor.dim() and tensor.shape[-1] == vocabulary else ACTIVATIONS

    return kind


def _alive_after_layers(
    module: nn.Module, config: PretrainedConfig, counted: Allocations
) -> list[int]:
    """Return a list that a forward pass fills: bytes alive after each of the decoder's layers."""
    layers = decoder_layers(module, config)
    alive: list[int] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda *_: alive.append(counted.live) if len(alive) < len(layers) else None
        )
    return alive


def _drop_gradients(module: nn.Module) -> None:
    """Drop every gradient once it is complete: an engine's are counted apart."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


@contextlib.contextmanager
def _unpacked_rows() -> Iterator[None]:
    """Make transformers treat each row as one text: it cannot read that off fake positions."""
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


class WorstCase(TorchFunctionMode):
    """Takes every mask for True everywhere, so that shapes depend on no values."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run a function, or what it comes to in the worst case."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and _is_mask(args[1]):
            return args[0].flatten(0, args[1].dim() - 1).clone()
        if func is torch.Tensor.__setitem__ and _is_mask(args[1]):
            return args[0].copy_(args[2].view(args[0].shape))
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool
