"""Frozen, unmerged LoRA adapters: y + B (A x) beside a layer's own y.

Where several models share weights, merging the adapter of one would change the others. Each layer
gets a `FixedUpdate` instead, which acts whether the layer's trainable adapter is on or off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.module.adapter import REWARD_HEAD, Adapter, Update
from dschat.utils.module.lora_layers import LoRAWeight
from dschat.utils.module.lora_parameters import is_transposed, reading, take_class, updated
from dschat.utils.module.low_rank import merged_weight

CHILD = "fixed_update"  # its name in the layer


class FixedUpdate(nn.Module):
    """Frozen low-rank update of one layer, or of a bare parameter; B holds the scaling.

    Args:
        updates: one for each adapter, added up. weight: the layer's, for device and dtype.
    """

    def __init__(self, updates: Sequence[Update], weight: torch.Tensor):
        super().__init__()
        A = torch.cat([u.lora_A.float() for u in updates], dim=-2)
        B = torch.cat([u.lora_B.float() * u.scaling for u in updates], dim=-1)
        self.A = nn.Parameter(A.to(weight), requires_grad=False)  # (..., r, in)
        self.B = nn.Parameter(B.to(weight), requires_grad=False)  # (..., out, r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(F.linear(x, self.A), self.B)


class FixedParameters(nn.Module):
    """Mixin for modules whose own parameters, such as experts' weights, have fixed updates."""

    base_class: type[nn.Module]
    fixed: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on these parameters with their fixed updates added."""
        updates = {leaf: getattr(self, f"{CHILD}_{leaf}") for leaf in self.fixed}
        values = {leaf: updated(self, leaf, u.A, u.B, 1.0) for leaf, u in updates.items()}
        with reading(self, values):
            return super().forward(*args, **kwargs)


def _add_to_output(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + getattr(layer, CHILD)(args[0])


def _put_on(layer: nn.Module, update: FixedUpdate) -> None:
    layer.add_module(CHILD, update)
    layer.register_forward_hook(_add_to_output)


def add_fixed_updates(model: PreTrainedModel, updates: Sequence[Mapping[str, Update]]) -> None:
    """Add fixed updates to layers and parameters; their weights do not change.

    Args:
        updates: for each adapter, its updates by the name in `model`.
    """
    for name in dict.fromkeys(name for adapter in updates for name in adapter):
        of_this = [adapter[name] for adapter in updates if name in adapter]
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf not in module._parameters:
            layer = model.get_submodule(name)
            _put_on(layer, FixedUpdate(of_this, cast(torch.Tensor, layer.weight)))
        else:
            fixed = module.fixed if isinstance(module, FixedParameters) else ()
            mixed = take_class(module, FixedParameters)
            mixed.fixed = (*fixed, leaf)
            mixed.add_module(f"{CHILD}_{leaf}", FixedUpdate(of_this, module.get_parameter(leaf)))


def move_fixed_update(layer: nn.Module, successor: nn.Module) -> None:
    """Move a layer's fixed update, if it has one, to the module that replaces it."""
    update = getattr(layer, CHILD, None)
    if update is not None:
        _put_on(successor, update)


def check_can_stay_unmerged(adapter: Adapter, setting: str) -> None:
    """Refuse an adapter with tensors other than low-rank updates and a reward head.

    Args:
        setting: what keeps the adapter unmerged, for the message.

    Raises:
        UserError: naming what it holds, and the remedy.
    """
    more = [name for name in adapter.full_tensors if not name.startswith(f"{REWARD_HEAD}.")]
    more += [name for name, update in adapter.updates.items() if update.of_embedding]
    more += [name for name, update in adapter.updates.items() if update.magnitude is not None]
    more += list(adapter.rows)
    if more:
        raise UserError(
            f"{setting}: adapter {adapter.name} holds more than low-rank updates of layers "
            f"({more[0]}: a full module, an embedding, rows of tokens or DoRA); leave {setting} out"
        )


def has_fixed_update(layer: nn.Module) -> bool:
    """Return whether a fixed update of a layer's, or of a module's own parameters, acts on it."""
    return isinstance(layer, FixedParameters) or hasattr(layer, CHILD)


def without_fixed_updates(
    state: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Return a consolidated state dict with the fixed updates of these modules merged."""
    merged = dict(state)
    for name, layer in modules.items():
        fixed = layer.fixed if isinstance(layer, FixedParameters) else ()
        children = {leaf: f"{CHILD}_{leaf}" for leaf in fixed}
        if hasattr(layer, CHILD):
            children["weight"] = CHILD
        for leaf, child in children.items():
            weight = merged[f"{name}.{leaf}"]
            lora_A, lora_B = (merged.pop(f"{name}.{child}.{matrix}") for matrix in "AB")
            if child != CHILD:
                transposed = is_transposed(layer, weight.shape)
            else:
                of_conv1d = isinstance(layer, Conv1D)
                transposed = layer.transposed if isinstance(layer, LoRAWeight) else of_conv1d
            merged[f"{name}.{leaf}"] = merged_weight(
                weight, lora_A, lora_B, scaling=1.0, transposed=transposed
            )
    return merged
