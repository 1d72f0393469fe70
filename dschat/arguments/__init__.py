"""Every flag once: frozen settings of each step, checked before any work starts."""

from dschat.arguments.data import BatchArguments, DataArguments, EvaluationArguments
from dschat.arguments.models import LoraArguments, ModelArguments
from dschat.arguments.rlhf import PPOArguments, RLHFSettings
from dschat.arguments.rollout import RolloutArguments
from dschat.arguments.run import RunArguments, StateArguments
from dschat.arguments.stability import StabilityArguments
from dschat.arguments.steps import RewardSettings, SFTSettings

__all__ = [
    "BatchArguments",
    "DataArguments",
    "EvaluationArguments",
    "LoraArguments",
    "ModelArguments",
    "PPOArguments",
    "RLHFSettings",
    "RewardSettings",
    "RolloutArguments",
    "RunArguments",
    "SFTSettings",
    "StabilityArguments",
    "StateArguments",
]
