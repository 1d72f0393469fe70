"""The settings of steps 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.arguments.data import BatchArguments, DataArguments
from dschat.arguments.models import ModelArguments
from dschat.arguments.run import RunArguments
from dschat.cli import SWITCH, flag, group
from dschat.utils.data.grouping import Grouping
from dschat.utils.data.tokenise import TRAIN_ON


@dataclass(frozen=True)
class SFTSettings:
    """Step 1, supervised fine-tuning."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelArguments = group(ModelArguments, full_rate=9.65e-6)
    run: RunArguments = group(RunArguments, tensorboard_path="step1_tensorboard")
    sft_only_data_path: list[str] = flag(
        [], "data used in this step alone (prompt and response)", nargs="*", type=str
    )
    train_on: str | None = flag(
        None,
        "which answers of a conversation train (default: all_turns where rows are conversations, "
        "last_turn where they are prompt and answer)",
        type=str,
        choices=list(TRAIN_ON),
    )
    train_on_prompt: bool = flag(False, "train on prompt tokens as well", **SWITCH)
    packing: bool = flag(
        False, "train on rows packed to --max_seq_len, kept apart by mask and positions", **SWITCH
    )
    print_loss: bool = flag(False, "print the loss of every optimizer step", **SWITCH)

    def __post_init__(self):
        self.grouping()
        batching = "packing" if self.packing else self.batch.own_batching
        self.data.check_streaming(self.run, self.batch.max_steps, batching)

    def grouping(self) -> Grouping:
        """How training rows become batches."""
        return self.batch.grouping(packing=self.packing)


@dataclass(frozen=True)
class RewardSettings:
    """Step 2, reward model."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelArguments = group(ModelArguments, full_rate=5e-5)
    run: RunArguments = group(RunArguments, tensorboard_path="step2_tensorboard")
    margin: float = flag(0.0, "margin by which chosen should beat rejected")
    centering_coefficient: float = flag(0.0, "weight of (chosen + rejected)^2")
    eval_iters: int | None = flag(
        None, "evaluation batches at --eval_interval (default: all)", type=int
    )
    num_padding_at_beginning: int = flag(1, "masks come from lengths", retired=True)

    def __post_init__(self):
        self.grouping()
        self.data.check_streaming(self.run, self.batch.max_steps, self.batch.own_batching)

    def grouping(self) -> Grouping:
        """How training pairs become batches."""
        return self.batch.grouping(sequences=2)
