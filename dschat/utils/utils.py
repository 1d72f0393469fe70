"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.models.save import save_hf_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.distributed import print_rank_0, set_random_seed
from dschat.utils.optim import get_optimizer_grouped_parameters

__all__ = [
    "get_optimizer_grouped_parameters",
    "load_hf_tokenizer",
    "print_rank_0",
    "save_hf_format",
    "set_random_seed",
]
