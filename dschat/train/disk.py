"""Room on the disk for what a run will write, compared before it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dschat.errors import UserError
from dschat.models.save_plan import SavePlan
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.files import Reserve, free_bytes, in_words

OPTIMIZER_BYTES = 12  # a parameter: the weight in fp32, and Adam's two averages


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model without its adapters, of the adapters, and of all that trains."""

    base: int
    adapters: int
    trained: int

    @classmethod
    def of(cls, module: nn.Module, base: int) -> ModelSize:
        """Count in a module that had `base` parameters before it got adapters; `meta` will do."""
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        total = sum(size for size, _ in sizes)
        return cls(base, total - base, sum(size for size, trains in sizes if trains))


@dataclass(frozen=True)
class Written:
    """Bytes that a run writes for one model: its folders at the end, and each checkpoint."""

    folders: int
    checkpoint: int

    @classmethod
    def of(
        cls, size: ModelSize, engine: EngineConfig, save: SavePlan, averaged: bool = False
    ) -> Written:
        """Estimate them, tokenizers and logs left out.

        Args:
            averaged: a moving average of what trains is kept and saved as well.
        """
        weight = 4 if engine.dtype == "fp32" else 2
        folder = weight * (size.base * save.merged + size.adapters * (save.adapter is not None))
        # Where the engine computes in the optimizer's own copy, the weights are not stored twice.
        twice = engine.dtype != "fp32" or engine.zero_stage > 0
        state = OPTIMIZER_BYTES + weight * twice + 4 * averaged
        return cls(folder * (1 + averaged), size.trained * state)


def reserve(output_dir: str, models: Iterable[Written]) -> Reserve:
    """Bytes of model folders that a run will write, which its data must leave free."""
    return Reserve(output_dir, sum(model.folders for model in models))


def check_disk(output_dir: str, models: Iterable[Written], checkpoints: int) -> None:
    """Stop where the disk of the output folder is too small; what is cached is on it by then.

    Args:
        checkpoints: the most that there are at a time, beside those that are there already.

    Raises:
        UserError: with the bytes needed and those free.
    """
    models = list(models)
    folders = sum(model.folders for model in models)
    states = checkpoints * sum(model.checkpoint for model in models)
    free = free_bytes(output_dir)
    if folders + states > free:
        parts = [f"{in_words(folders)} of model folders"]
        if checkpoints:
            parts.append(f"{in_words(states)} of {checkpoints} checkpoints")
        raise UserError(
            f"output_dir {output_dir}: the run will write {in_words(folders + states)} "
            f"({' and '.join(parts)}), and {in_words(free)} are free on that disk; free some, or "
            "give an output_dir on another disk"
        )
