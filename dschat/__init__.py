"""Supervised fine-tuning, reward modelling and PPO with LoRA+, on the DeepSpeed engine.

    from dschat import SFT, RewardModel, DPO, PPO

trains from Python (docs/python.md); they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dschat.api.steps import DPO, PPO, SFT, RewardModel
    from dschat.errors import UserError

__version__ = "1.0.0"
__all__ = ["DPO", "PPO", "SFT", "RewardModel", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from dschat.errors import UserError

        return UserError
    if name in __all__:
        from dschat.api import steps

        return getattr(steps, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
