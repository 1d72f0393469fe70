"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.models.reward_model import RewardModel

__all__ = ["RewardModel"]
