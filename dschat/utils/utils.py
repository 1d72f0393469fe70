"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.models.save import save_hf_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.distributed import print_rank_0, set_random_seed
from dschat.utils.optim import get_optimizer_grouped_parameters
from dschat.utils.predecessor import moved as _moved

__all__ = [
    "get_optimizer_grouped_parameters",
    "load_hf_tokenizer",
    "print_rank_0",
    "save_hf_format",
    "set_random_seed",
]
__getattr__ = _moved(
    __name__,
    {
        "ExponentialMovingAverage": "dschat.rlhf.ema.EMA",
        "MovingAverage": "dschat.rlhf.ema.EMA for weights; figures are in metrics.jsonl",
        "get_all_reduce_mean": "dschat.utils.distributed.all_reduce_sum, divided by your count",
        "get_tokenizer": "dschat.utils.utils.load_hf_tokenizer",
        "is_rank_0": "dschat.utils.distributed.Distributed, its is_main",
        "load_state_dict_into_model": "dschat.utils.model.model_utils.create_hf_model",
        "log_init": "dschat.utils.distributed.print_rank_0",
        "moving_average": "dschat.rlhf.ema.EMA",
        "save_zero_three_model": "dschat.utils.utils.save_hf_format, of every ZeRO stage",
        "to_device": "the method .to(device) of a batch (dschat.data.batches.Batch)",
    },
)
