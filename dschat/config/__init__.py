"""Every flag once: frozen settings of each step, checked before any work starts."""

from dschat.config.rlhf import PPOArguments, RLHFSettings
from dschat.config.rollout import RolloutArguments
from dschat.config.stability import StabilityArguments
from dschat.config.steps import RewardSettings, SFTSettings

__all__ = [
    "PPOArguments",
    "RLHFSettings",
    "RewardSettings",
    "RolloutArguments",
    "SFTSettings",
    "StabilityArguments",
]
