"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.utils.predecessor import moved as _moved

__all__ = ["create_critic_model", "create_hf_model"]
__getattr__ = _moved(
    __name__,
    {
        "causal_lm_model_to_fp32_loss": "not needed: every loss is fp32 (dschat.functional.losses)",
        "configure_dropout": "the argument dropout of create_hf_model and create_critic_model",
    },
)
