"""Every flag once: frozen settings of each step, checked before any work starts."""

from dschat.config.rlhf import RLHFSettings
from dschat.config.steps import DPOSettings, RewardSettings, SFTSettings

__all__ = ["DPOSettings", "RLHFSettings", "RewardSettings", "SFTSettings"]
