"""Checkpoint files read without running code that they may hold."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from dschat.errors import UserError
from dschat.train.engine import Engine


def load_file(path: str, map_location: Any = "cpu") -> Any:
    """Read a file of `torch.save`: tensors, numbers, texts, and DeepSpeed's records of these.

    Args:
        map_location: where storages go, as in `torch.load`.

    Raises:
        UserError: the file is damaged, or holds anything else, which is not even looked up.
    """
    try:
        with torch.serialization.safe_globals(_deepspeeds_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it holds more than tensors and numbers, or is damaged; resume from "
            "another checkpoint"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); resume from another") from error


def _deepspeeds_classes() -> list[type | Callable[..., Any] | tuple[Any, str]]:
    """Classes of numbers that DeepSpeed saves as objects; none does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return [*classes, (_stage, "builtins.getattr"), (_stage, "__builtin__.getattr")]


def _stage(kind: Any, name: Any) -> Any:
    """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration.

    Raises:
        UnpicklingError: it is asked for anything but a ZeRO stage.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("getattr of something else than ZeRO stages")
    return ZeroStageEnum[name]


def make_loading_safe(engine: Engine) -> None:
    """Make an engine read checkpoints by `load_file`; DeepSpeed's own loading runs any code."""
    engine.checkpoint_engine.load = load_file
