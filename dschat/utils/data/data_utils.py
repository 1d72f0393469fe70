"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.data.datasets import create_prompt_dataset

__all__ = ["create_prompt_dataset"]
