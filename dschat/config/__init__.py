"""Every flag once: frozen settings of each step, checked before any work starts."""

from dschat.config.rlhf import RLHFSettings
from dschat.config.steps import RewardSettings, SFTSettings

__all__ = ["RLHFSettings", "RewardSettings", "SFTSettings"]
