"""The settings of steps 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.config.data import BatchArguments, DataArguments
from dschat.config.models import ModelConfig
from dschat.config.run import RunArguments
from dschat.data.batching import Grouping
from dschat.data.tokenise import TRAIN_ON
from dschat.settings import Settings, group, setting


@dataclass(frozen=True)
class SFTSettings(Settings):
    """Step 1, supervised fine-tuning."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 9.65e-6})
    run: RunArguments = group(RunArguments, tensorboard_path="step1_tensorboard")
    sft_only_data_path: tuple[str, ...] = setting(
        (), "data used in this step alone (prompt and response)", may_be_empty=True
    )
    train_on: str | None = setting(
        None,
        "which answers of a conversation train (default: all_turns where rows are conversations, "
        "last_turn where they are prompt and answer)",
        choices=tuple(TRAIN_ON),
    )
    train_on_prompt: bool = setting(False, "train on prompt tokens as well")
    packing: bool = setting(
        False, "train on rows packed to --max_seq_len, kept apart by mask and positions"
    )
    print_loss: bool = setting(False, "print the loss of every optimizer step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grouping()
        batching = "packing" if self.packing else self.batch.own_batching
        self.data.check_streaming(self.run, self.batch.max_steps, batching)

    def grouping(self) -> Grouping:
        """How training rows become batches."""
        return self.batch.grouping(packing=self.packing)


@dataclass(frozen=True)
class RewardSettings(Settings):
    """Step 2, reward model."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 5e-5})
    run: RunArguments = group(RunArguments, tensorboard_path="step2_tensorboard")
    margin: float = setting(0.0, "margin by which chosen should beat rejected")
    centering_coefficient: float = setting(0.0, "weight of (chosen + rejected)^2")
    eval_iters: int | None = setting(None, "evaluation batches at --eval_interval (default: all)")
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grouping()
        self.data.check_streaming(self.run, self.batch.max_steps, self.batch.own_batching)

    def grouping(self) -> Grouping:
        """How training pairs become batches."""
        return self.batch.grouping(sequences=2)
