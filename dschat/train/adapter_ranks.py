"""The largest adapters that a model's matrices can use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.utils.module.lora_config import LoraConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of all adapted weights: layers that hold no more together (routers, gates) do not decide.
NEGLIGIBLE = 0.01


def adapted_shapes(module: nn.Module, lora: LoraConfig) -> dict[str, torch.Size]:
    """Map the names of the weights that get adapters to their shapes: (out, in), or (E, …, …)."""
    from dschat.utils.module.targets import match_layers

    modules, weights = dict(module.named_modules()), dict(module.named_parameters())
    return {
        name: (modules[name].weight if name in modules else weights[name]).shape
        for name in match_layers(module, lora)
    }


def fitting_dim(shapes: Mapping[str, torch.Size], lora_dim: int) -> int:
    """The largest `lora_dim`, up to the given one, that counts in every layer of some size."""
    total = sum(shape.numel() for shape in shapes.values())
    smaller = 0
    for shape in sorted(shapes.values(), key=_rank):
        smaller += shape.numel()
        if smaller > NEGLIGIBLE * total:
            return min(_rank(shape), lora_dim)
    return lora_dim


def beyond_rank(model: str, shapes: Mapping[str, torch.Size], lora_dim: int) -> str | None:
    """Say which layers of a model a `lora_dim` is too high for; None where there are none.

    It is advice only where a lower one would lose nothing: `fitting_dim`.

    Raises:
        UserError: it is too high for all of them.
    """
    from dschat.utils.module.targets import short_name

    ranks = {name: _rank(shape) for name, shape in shapes.items()}
    lower = {name: rank for name, rank in ranks.items() if rank < lora_dim}
    if not lower:
        return None
    if len(lower) == len(ranks):
        name = max(ranks, key=ranks.__getitem__)
        raise UserError(
            f"lora_dim {lora_dim}: no adapted layer has a rank above {ranks[name]} "
            f"({name}), so a larger adapter adds nothing; give at most that"
        )
    kinds: dict[int, list[str]] = {}
    for name, rank in sorted(lower.items(), key=lambda item: item[1]):
        kind = kinds.setdefault(rank, [])
        if (short := short_name(name)) not in kind:
            kind.append(short)
    listed = "; ".join(f"{', '.join(names)}: {rank}" for rank, names in kinds.items())
    fact = (
        f"{model}: lora_dim {lora_dim} is above the rank of {len(lower)} of {len(ranks)} adapted "
        f"layers ({listed}), where the rest of it adds nothing"
    )
    best = fitting_dim(shapes, lora_dim)
    if best == lora_dim:
        return f"{fact}; they are small, and it counts in the others"
    return f"advice: {fact}: give at most {best}"


def _rank(shape: torch.Size) -> int:
    return min(shape[-2:])
