"""Adapters on bare parameters: the 3-D weights of experts, and the routers beside them.

The code of the model multiplies by one expert's slice, by gathered slices, or by all experts in
one grouped product. The module keeps that code: `LoRAParameters` is mixed into its class, and in
its forward pass an adapted parameter reads as a `LowRankWeight`. Parameter names, and so a state
dict without its `lora_` entries, are those of the base model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRALayer
from dschat.utils.module.low_rank import draw_adapter, merged_weight
from dschat.utils.module.low_rank_weight import LINEAR, LowRankWeight
from dschat.utils.zero import full_shape

Mixin = TypeVar("Mixin", bound=nn.Module)


def is_transposed(module: nn.Module, shape: Sequence[int]) -> bool:
    """Return whether a parameter of this shape is stored as (experts, in, out), by PEFT's rule."""
    return len(shape) == 3 and getattr(module, "is_transposed", False)


def multiplies_by_torch(module: nn.Module) -> bool:
    """Return whether a forward uses only torch's own matrix products; others need the dense sum.

    Others are kernels for experts, and the `F.linear` that ZeRO-3 puts in place of torch's.
    """
    has_implementations = hasattr(module, "has_gate")  # transformers' mark
    config: Any = module.config if has_implementations else None
    chosen = getattr(config, "_experts_implementation", None)
    is_plain = chosen in (None, "eager") and F.linear is LINEAR
    return is_plain or chosen in ("grouped_mm", "batched_mm")


def updated(
    module: nn.Module, leaf: str, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> LowRankWeight | torch.Tensor:
    """Return a module's parameter with an update, added to what the parameter reads as now."""
    weight = getattr(module, leaf)
    if is_transposed(module, weight.shape):
        lora_B, lora_A = lora_A.mT, lora_B.mT
    weight = LowRankWeight(weight, lora_B, lora_A, scaling)
    return weight if multiplies_by_torch(module) else weight.dense()


@contextlib.contextmanager
def reading(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Replace what a module's parameters read as inside the block."""
    own = vars(module)  # attributes here hide parameters of the same name
    before = {leaf: own[leaf] for leaf in values if leaf in own}
    own.update(values)
    try:
        yield
    finally:
        for leaf in values:
            del own[leaf]
        own.update(before)


def take_class(module: nn.Module, mixin: type[Mixin]) -> Mixin:
    """Mix a class into a module's own class, in place; `base_class` keeps the own one."""
    if not isinstance(module, mixin):
        kind = type(module)
        name = f"{mixin.__name__}{kind.__name__}"
        module.__class__ = type(name, (mixin, kind), {"base_class": kind})
    assert isinstance(module, mixin)
    return module


class LoRAParameters(LoRALayer):
    """A module with adapters on some of its own parameters, stored as (experts, out, in).

    The adapter of a parameter p is `lora_A_p` (experts, r, in) and `lora_B_p` (experts, out, r).
    Without an axis of experts, as in a router's weight, all three are matrices. In a module with
    `is_transposed`, p is (experts, in, out).
    """

    base_class: type[nn.Module]

    def _add_adapters(self, leaves: Sequence[str], config: LoraConfig) -> None:
        self.adapted, self.adapter_enabled = tuple(leaves), True
        self.scaling, self.rank = config.scaling, config.lora_dim
        for leaf in leaves:
            weight = self._parameters[leaf]
            assert weight is not None
            shape = full_shape(weight)
            *experts, outer, inner = shape
            if is_transposed(self, shape):
                outer, inner = inner, outer
            sizes = {"A": (*experts, self.rank, inner), "B": (*experts, outer, self.rank)}
            for matrix, size in sizes.items():
                empty = torch.empty(size, dtype=weight.dtype, device=weight.device)
                self.register_parameter(f"lora_{matrix}_{leaf}", nn.Parameter(empty))
            draw_adapter(*self._matrices(leaf), config.lora_init)

    def _matrices(self, leaf: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"lora_A_{leaf}"), getattr(self, f"lora_B_{leaf}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on its parameters with their updates added."""
        if not self.adapter_enabled:
            return super().forward(*args, **kwargs)
        values = {n: updated(self, n, *self._matrices(n), self.scaling) for n in self.adapted}
        with reading(self, values):
            return super().forward(*args, **kwargs)

    def merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merge one expert at a time."""
        return {
            leaf: merged_weight(
                tensors[leaf],
                tensors[f"lora_A_{leaf}"],
                tensors[f"lora_B_{leaf}"],
                scaling=self.scaling,
                transposed=is_transposed(self, tensors[leaf].shape),
            )
            for leaf in self.adapted
        }

    def without_adapter(self) -> nn.Module:
        """Restore the module's own class, in place."""
        for leaf in self.adapter:
            delattr(self, leaf)
        self.__class__ = self.base_class  # type: ignore[assignment]
        return self

    def extra_repr(self) -> str:
        """Describe the adapted parameters for `print(model)`."""
        return f"{', '.join(self.adapted)}, r={self.rank}, s={self.scaling:g}"


def adapt_parameters(
    module: nn.Module, leaves: Sequence[str], config: LoraConfig
) -> LoRAParameters:
    """Put adapters on parameters of a module, in place."""
    adapted = take_class(module, LoRAParameters)
    adapted._add_adapters(leaves, config)
    return adapted
