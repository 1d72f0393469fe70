"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model

__all__ = ["create_critic_model", "create_hf_model"]
