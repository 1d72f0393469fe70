"""Every flag once: frozen settings of each step, checked before any work starts."""

from dschat.config.models import ModelConfig
from dschat.config.rlhf import PPOArguments, RLHFSettings
from dschat.config.rollout import RolloutArguments
from dschat.config.run import RunArguments, StateArguments
from dschat.config.stability import StabilityArguments
from dschat.config.steps import RewardSettings, SFTSettings

__all__ = [
    "ModelConfig",
    "PPOArguments",
    "RLHFSettings",
    "RewardSettings",
    "RolloutArguments",
    "RunArguments",
    "SFTSettings",
    "StabilityArguments",
    "StateArguments",
]
