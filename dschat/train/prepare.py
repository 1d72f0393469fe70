"""Start-up of every program: device, process group, tokenizer, output folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dschat.models.save import check_output_dir
from dschat.text.formats import CONFIG_KEY, describe_format, set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import resolve_dtype, torch_dtype
from dschat.train.run_config import StartConfig
from dschat.utils.distributed import (
    Distributed,
    init_distributed,
    print_rank_0,
    set_random_seed,
)
from dschat.utils.perf import Gpus


@dataclass(frozen=True)
class RunContext:
    """A process that is ready to load data and models.

    Attributes:
        dtype_name: the resolved dtype that models are loaded and computed in.
    """

    distributed: Distributed
    dtype_name: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return torch_dtype(self.dtype_name)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.distributed.device

    @property
    def rank(self) -> int:
        """Number of this process among `world_size`."""
        return self.distributed.rank

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self.distributed.world_size

    @property
    def gpus(self) -> Gpus:
        """The devices, for throughput."""
        is_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_cuda else None
        return Gpus(self.world_size, self.dtype, name)


def setup_run(
    model_name_or_path: str,
    config: StartConfig,
    *,
    output_dir: str | None = None,
    prompt_format: str | None = None,
    teaches_format: bool = False,
) -> RunContext:
    """Join the process group and check what can be checked without data or weights.

    Args:
        prompt_format: None takes the one stored with the model, or its default.
        teaches_format: the model may learn another format than the stored one.

    Raises:
        UserError: a dtype that the device lacks, no tokenizer, an output folder that cannot be
            written, a prompt format that the model cannot have.
    """
    dtype, end = resolve_dtype(config.dtype), config.answer_end
    check_output_dir(output_dir)
    tokenizer = load_hf_tokenizer(model_name_or_path, end is not None, end or "<|endoftext|>")
    stored = tokenizer.init_kwargs.get(CONFIG_KEY)
    form = set_format(
        tokenizer, prompt_format, teaches=teaches_format, end_is_given=end is not None
    )
    distributed = init_distributed()
    print_rank_0(describe_format(form, tokenizer, stored), distributed.rank)
    set_random_seed(config.seed)
    return RunContext(distributed, dtype, tokenizer)
