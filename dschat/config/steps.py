"""The settings of steps 1 and 2."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from dschat.config.data import check_streaming
from dschat.data.batching import BatchSampler
from dschat.data.config import BatchConfig, DataConfig, SFTDataConfig
from dschat.settings import Settings, group, setting
from dschat.train.run_config import ModelConfig, RunConfig


@dataclass(frozen=True)
class StepSettings(Settings):
    """Settings that steps 1 and 2 share."""

    model_name_or_path: str = setting(MISSING, "model folder or hub id", may_change=True)
    batch: BatchConfig = group(BatchConfig)
    eval_interval: int = setting(
        0, "optimizer steps between evaluations; 0: per epoch only", at_least=0
    )
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: after the data", at_least=0)


@dataclass(frozen=True)
class SFTSettings(StepSettings):
    """Step 1, supervised fine-tuning."""

    data: SFTDataConfig = group(SFTDataConfig)
    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 9.65e-6})
    run: RunConfig = group(RunConfig, log={"tensorboard_path": "step1_tensorboard"})
    train_on_prompt: bool = setting(False, "train on prompt tokens as well")
    packing: bool = setting(
        False, "train on rows packed to --max_seq_len, kept apart by mask and positions"
    )
    print_loss: bool = setting(False, "print the loss of every optimizer step", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler()
        batching = "packing" if self.packing else self.batch.own_batching
        check_streaming(self.data, self.run, self.max_steps, batching)

    def sampler(self) -> BatchSampler:
        """Choose how training rows become batches."""
        return self.batch.sampler(packing=self.packing)


@dataclass(frozen=True)
class RewardSettings(StepSettings):
    """Step 2, reward model."""

    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 5e-5})
    run: RunConfig = group(RunConfig, log={"tensorboard_path": "step2_tensorboard"})
    margin: float = setting(0.0, "margin by which chosen should beat rejected")
    centering_coefficient: float = setting(0.0, "weight of (chosen + rejected)^2")
    eval_iters: int | None = setting(None, "evaluation batches at --eval_interval (default: all)")
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler()
        check_streaming(self.data, self.run, self.max_steps, self.batch.own_batching)

    def sampler(self) -> BatchSampler:
        """Choose how training pairs become batches."""
        return self.batch.sampler(sequences=2)
