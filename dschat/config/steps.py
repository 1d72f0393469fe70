"""The settings of steps 1 and 2, and of DPO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dschat.config.data import check_streaming
from dschat.data.config import SFTDataConfig
from dschat.errors import UserError
from dschat.settings import given_flags, group, setting
from dschat.train.model_config import ModelConfig
from dschat.train.preference_config import PreferenceConfig
from dschat.train.run_config import RunConfig
from dschat.train.step_settings import StepSettings

if TYPE_CHECKING:
    from dschat.data.batching import BatchSampler
    from dschat.data.collators import RewardCollator

# Settings of the data that decide which rows are evaluated, and as which tokens.
EVALUATION_DATA = (
    *("dataset_columns", "dataset_function", "prompt_format", "keep_special_tokens"),
    *("streaming", "max_eval_samples"),
)


@dataclass(frozen=True)
class SFTSettings(StepSettings):
    """Step 1, supervised fine-tuning."""

    KIND, PHASE = "step 1 (SFT)", 1

    data: SFTDataConfig = group(SFTDataConfig)
    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 9.65e-6})
    run: RunConfig = group(
        RunConfig, output_dir="./output/sft", log={"tensorboard_path": "step1_tensorboard"}
    )
    train_on_prompt: bool = setting(False, "train on prompt tokens as well")
    packing: bool = setting(
        False, "train on rows packed to --max_seq_len, kept apart by mask and positions"
    )
    print_loss: bool = setting(False, "print the loss of every optimizer step", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch.check_sampler(packing=self.packing)
        batching = "packing" if self.packing else self.batch.own_batching
        check_streaming(self.data, self.run, self.max_steps, batching)

    def check_model(self) -> None:
        """Stop where the model cannot be trained by these settings; read its config alone."""
        super().check_model()
        if self.packing:
            from dschat.models.packing import check_packing

            check_packing(
                self.model_name_or_path, self.batch.max_seq_len, self.run.attn_implementation
            )

    def sampler(self) -> BatchSampler:
        """Choose how training rows become batches."""
        return self.batch.sampler(packing=self.packing)


@dataclass(frozen=True)
class RewardSettings(StepSettings):
    """Step 2, reward model."""

    KIND, PHASE = "step 2 (reward model)", 2

    model: ModelConfig = group(ModelConfig, optimizer={"full_rate": 5e-5, "full_rate_size": 3.5e8})
    run: RunConfig = group(
        RunConfig, output_dir="./output/reward", log={"tensorboard_path": "step2_tensorboard"}
    )
    margin: float = setting(
        0.0, "margin by which chosen should beat rejected, where a row has none of its own"
    )
    label_smoothing: float = setting(
        0.0, "share of preferences taken to be the wrong way round", at_least=0, below=0.5
    )
    centering_coefficient: float = setting(0.0, "weight of (chosen + rejected)^2", at_least=0)
    endless_share: float = setting(
        0.0,
        "share of answers that train without their end token, as those that a length limit cuts",
        at_least=0,
        at_most=1,
    )
    share_prompts: bool = setting(
        False, "compute the prompt of a pair once, in batches where that is less work"
    )
    train_head_only: bool = setting(False, "train the reward head on a frozen trunk")
    eval_iters: int | None = setting(
        None, "evaluation batches at --eval_interval (default: all)", at_least=1
    )
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_head_only and self.model.lora.lora_dim:
            raise UserError(
                "train_head_only and lora_dim contradict: adapters change the trunk; drop one"
            )
        self.batch.check_sampler(sequences=2)
        check_streaming(self.data, self.run, self.max_steps, self.batch.own_batching)

    def check_model(self) -> None:
        """Stop where the model cannot be trained by these settings; read its config alone."""
        super().check_model()
        if self.share_prompts:
            from dschat.models.shared_prompt_proof import check_shared_prompts

            check_shared_prompts(
                self.model_name_or_path, self.batch.max_seq_len, self.run.attn_implementation
            )

    @property
    def trains_head_only(self) -> bool:
        """Return whether the trunk stays as it is."""
        return self.train_head_only

    def sampler(self) -> BatchSampler:
        """Choose how training pairs become batches."""
        return self.batch.sampler(sequences=2)

    def collator(self, pad_token_id: int) -> RewardCollator:
        """Make what turns training pairs into batches."""
        from dschat.data.collators import RewardCollator

        return RewardCollator(
            pad_token_id, self.margin, self.endless_share, self.run.seed, self.share_prompts
        )

    def evaluation_flags(self, dtype: str) -> dict[str, Any]:
        """List the flags by which `rw_eval.py` repeats this run's evaluation."""
        given = {
            flag.name: flag.value(self) for flag in given_flags(self) if flag.path[0] == "data"
        }
        return {
            **{name: given[name] for name in EVALUATION_DATA if name in given},
            "data_path": self.data.data_path,
            "max_seq_len": self.batch.max_seq_len,
            "batch_size": self.batch.per_device_eval_batch_size,
            "seed": self.run.seed,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class DPOSettings(StepSettings):
    """DPO and its kin: learn from preferences without a reward model."""

    KIND, PHASE = "step 2 (DPO)", 2

    model: ModelConfig = group(
        ModelConfig,
        dropout=0.0,
        optimizer={"full_rate": 1e-6, "full_rate_size": 2.8e9, "full_to_lora": 10.0},
    )
    run: RunConfig = group(
        RunConfig, output_dir="./output/dpo", log={"tensorboard_path": "step2_tensorboard"}
    )
    preference: PreferenceConfig = group(PreferenceConfig)
    print_loss: bool = setting(False, "print the loss of every optimizer step", may_change=True)
    offload_reference_model: bool = setting(
        False,
        "no second model stands on the device: see --reference",
        retired=True,
    )
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch.check_sampler(sequences=2)
        rates = replace(self.model.optimizer, full_rate=self.preference.loss.full_rate)
        object.__setattr__(self, "model", replace(self.model, optimizer=rates))
        model = replace(self.model, train_base=self.run.train_base_model)
        self.preference.choose_reference(model)
        check_streaming(self.data, self.run, self.max_steps, self.batch.own_batching)
        if self.data.streaming:
            self.preference.check_streaming(model)

    def sampler(self) -> BatchSampler:
        """Choose how training pairs become batches."""
        return self.batch.sampler(sequences=2)
