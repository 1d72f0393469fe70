"""A process of a run, ready to load data and models: dtype, tokenizer, process group, seed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dschat.data.batching import BatchSampler, Loader, build_loader
from dschat.data.config import DataConfig
from dschat.data.datasets import PromptData, create_prompt_dataset
from dschat.data.stream import RowStream, StreamLoader
from dschat.models.config import check_kind
from dschat.text.formats import CONFIG_KEY, describe_format, set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train import phases
from dschat.train.engine import resolve_dtype, torch_dtype
from dschat.train.run_config import StartConfig
from dschat.utils.distributed import (
    Distributed,
    init_distributed,
    print_rank_0,
    set_random_seed,
)
from dschat.utils.files import Reserve
from dschat.utils.perf import Gpus
from dschat.utils.waiting import from_local_main


def _hear_libraries(verbose: bool) -> None:
    """Set how much libraries print: everything, or errors alone."""
    if verbose:
        transformers_logging.set_verbosity_info()
        datasets.logging.set_verbosity_info()
        logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    else:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets.logging.set_verbosity_error()


@dataclass(frozen=True)
class RunContext(Distributed):
    """A process of the run that is ready to load data and models.

    Attributes:
        dtype_name: the resolved dtype that models are loaded and computed in.
    """

    dtype_name: str
    tokenizer: PreTrainedTokenizerBase
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return torch_dtype(self.dtype_name)

    @property
    def gpus(self) -> Gpus:
        """The devices, for throughput."""
        is_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_cuda else None
        return Gpus(self.world_size, self.dtype, name)

    def load_data(
        self,
        config: DataConfig,
        phase: int,
        max_seq_len: int,
        max_prompt_len: int | None = None,
        *,
        later: Reserve | None = None,
    ) -> PromptData:
        """Tokenise the rows of a phase, once on each node, and print their counts.

        Args:
            later: what the run will write after them.
        """
        data = create_prompt_dataset(
            config,
            self.tokenizer,
            phase,
            seed=self.seed,
            max_seq_len=max_seq_len,
            max_prompt_len=max_prompt_len,
            once=from_local_main,
            later=later,
        )
        print_rank_0("\n".join(data.report.lines()))
        return data

    def sample(
        self, rows: datasets.Dataset, batches: int | None, batch_size: int
    ) -> datasets.Dataset:
        """Choose at random, once for all, the rows of so many batches on every rank; None: all."""
        if batches is None:
            return rows
        count = min(len(rows), batches * batch_size * self.world_size)
        return rows.shuffle(self.seed).select(range(count))

    def loader(
        self,
        rows: datasets.Dataset | RowStream,
        collator: Callable[[Sequence[Any]], Any],
        batches: int | BatchSampler,
        *,
        shuffle: bool,
    ) -> Loader | StreamLoader:
        """Build a loader of this rank's batches: so many rows each, or a sampler's."""
        return build_loader(
            rows,
            collator,
            batches,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=shuffle,
        )


def setup_run(
    model_name_or_path: str,
    config: StartConfig,
    prompt_format: str | None = None,
    *,
    teaches_format: bool = False,
    process: Distributed | None = None,
) -> RunContext:
    """Join the process group and check what can be checked without data or weights.

    Args:
        prompt_format: None takes the one stored with the model, or its default.
        teaches_format: the model may learn another format than the stored one.
        process: takes the place of the one that would join, where nothing will train.

    Raises:
        UserError: a dtype that the device lacks, no tokenizer, a prompt format that the model
            cannot have.
    """
    phases.begin()
    _hear_libraries(config.verbose)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they redraw a line, which a file would keep
    dtype, end = resolve_dtype(config.dtype), config.answer_end
    check_kind(model_name_or_path)
    tokenizer = load_hf_tokenizer(
        model_name_or_path, add_eot_token=end is not None, eot_token=end or "<|endoftext|>"
    )
    stored = tokenizer.init_kwargs.get(CONFIG_KEY)
    form = set_format(
        tokenizer, prompt_format, teaches=teaches_format, end_is_given=end is not None
    )
    process = process or init_distributed(config.rank_timeout)
    print_rank_0(describe_format(form, tokenizer, stored), process.rank)
    set_random_seed(config.seed)
    return RunContext(**vars(process), dtype_name=dtype, tokenizer=tokenizer, seed=config.seed)
