"""Re-exports of the names that DeepSpeed-Chat users import from here; nothing else."""

from dschat.data.config import DataConfig as _DataConfig
from dschat.data.datasets import create_prompt_dataset as _create_prompt_dataset
from dschat.utils.predecessor import changed as _changed
from dschat.utils.predecessor import moved as _moved

__all__ = ["create_prompt_dataset"]
create_prompt_dataset = _changed(
    "create_prompt_dataset(DataConfig(...), tokenizer, phase, seed=1234, max_seq_len=512)",
    config=_DataConfig,
)(_create_prompt_dataset)
__getattr__ = _moved(
    __name__,
    {
        "DataCollatorRLHF": "dschat.data.collators.PromptCollator",
        "DataCollatorReward": "dschat.data.collators.PairCollator",
        "MiniDataset": "dschat.rlhf.experience.in_micro_batches",
        "PromptDataset": "dschat.data.datasets.PromptData",
        "create_dataset": "dschat.utils.data.data_utils.create_prompt_dataset",
        "create_dataset_split": "dschat.utils.data.data_utils.create_prompt_dataset",
        "get_raw_dataset": "dschat.data.store.load_source",
        "get_raw_dataset_split_index": "dschat.data.store.phase_split",
        "get_shuffle_idx": "dschat.data.store.phase_split",
        "get_unsupervised_data": "dschat.data.text_blocks.create_text_blocks",
    },
)
