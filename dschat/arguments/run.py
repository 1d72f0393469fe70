"""Flags that every step shares: output, precision, schedule, training states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dschat.arguments.models import ModelArguments
from dschat.cli import SWITCH, flag, group
from dschat.errors import UserError
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.engine import Recipe, Schedule, check_optimizer_block
from dschat.utils.metrics import Continued, require_package
from dschat.utils.optim import SCHEDULES, schedule_factory
from dschat.utils.progress import LogConfig
from dschat.utils.save_plan import SavePlan, plan_saving
from dschat.utils.state_folder import NEWEST
from dschat.utils.training_state import StateConfig


@dataclass(frozen=True)
class StateArguments:
    """Flags of training states: saving them, and resuming from one."""

    save_steps: int = flag(
        0,
        "steps (in step 3 iterations) between training states under OUTPUT_DIR/checkpoints; "
        "0: none",
    )
    save_total_limit: int = flag(1, "keep so many of them, the newest")
    resume: str | None = flag(
        None,
        "go on from this training state; without a value from the newest, if there is one",
        type=str,
        nargs="?",
        const=NEWEST,
    )
    resume_with_new_rates: bool = flag(
        False, "resume with the learning rates and ratios given now, not the saved ones", **SWITCH
    )

    def __post_init__(self):
        if self.save_steps < 0:
            raise UserError(f"save_steps is {self.save_steps}: give 0 (never) or more")
        if self.save_total_limit < 1:
            raise UserError(f"save_total_limit is {self.save_total_limit}: give at least 1")
        if self.resume_with_new_rates and self.resume is None:
            raise UserError("resume_with_new_rates: nothing is resumed; add --resume")


@dataclass(frozen=True)
class RunArguments:
    """Flags that every step shares."""

    output_dir: str | None = flag(None, "where the trained model is written", type=str)
    seed: int = flag(1234, "seed of data order, splits, initialisation and sampling")
    dtype: str = flag(
        "auto", "auto is bf16 where the device has it", choices=["auto", "fp32", "bf16", "fp16"]
    )
    num_train_epochs: int = flag(1, "passes over the training data")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    gradient_clipping: float = flag(1.0, "largest gradient norm")
    lr_scheduler_type: str = flag("cosine", "shape of the schedule", choices=list(SCHEDULES))
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    offload: bool = flag(
        False, "keep optimizer states on the CPU (parameters too at ZeRO-3)", **SWITCH
    )
    only_optimize_lora: bool = flag(False, "train adapters and heads only (the default)", **SWITCH)
    train_base_model: bool = flag(False, "with LoRA: train the base weights as well", **SWITCH)
    lora_save: str = flag(
        "both",
        "with LoRA, write merged weights, the adapter in PEFT's format, or both",
        choices=["both", "merged", "adapter"],
    )
    deepspeed_config: str | None = flag(None, "DeepSpeed JSON merged over ours", type=str)
    enable_tensorboard: bool = flag(False, "write TensorBoard events", **SWITCH)
    tensorboard_path: str = flag("tensorboard", "folder of the TensorBoard events")
    wandb_project: str | None = flag(None, "log to this Weights & Biases project", type=str)
    add_eot_token: bool = flag(False, "end answers with --eot_token instead of the eos", **SWITCH)
    eot_token: str = flag("<|endoftext|>", "the token of --add_eot_token")
    log_every: int = flag(10, "optimizer steps between metrics")
    deepspeed: bool = flag(False, "accepted: DeepSpeed is always used", **SWITCH)
    local_rank: int = flag(-1, "accepted: the launcher's environment decides")
    compute_fp32_loss: bool = flag(
        False, "losses are always computed in fp32", retired=True, **SWITCH
    )
    states: StateArguments = group(StateArguments)

    def __post_init__(self):
        for name in ("num_train_epochs", "gradient_accumulation_steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.num_warmup_steps < 0:
            raise UserError(f"num_warmup_steps is {self.num_warmup_steps}: give 0 or more")
        if self.output_dir is None and self.state_config().in_use:
            flag_name = "save_steps" if self.states.save_steps else "resume"
            raise UserError(
                f"{flag_name}: training states lie in the output folder; add --output_dir"
            )
        if self.only_optimize_lora and self.train_base_model:
            raise UserError("only_optimize_lora and train_base_model contradict: drop one")
        if self.enable_tensorboard:
            require_package("tensorboard", "--enable_tensorboard")
        if self.wandb_project is not None:
            require_package("wandb", "--wandb_project")

    @property
    def answer_end(self) -> str | None:
        """The token that ends answers in place of the tokenizer's eos."""
        return self.eot_token if self.add_eot_token else None

    def recipe(self, model: ModelArguments) -> Recipe:
        """How one model trains; the optimizer of a DeepSpeed JSON must agree with the flags."""
        recipe = Recipe(
            optimizer=model.optimizer_config(),
            lora=model.lora.config(),
            train_base=self.train_base_model,
            gradient_checkpointing=model.gradient_checkpointing,
        )
        if model.lora.quantize_base is not None:
            self._check_quantized(model)
        if self.deepspeed_config is not None:
            check_optimizer_block(self.deepspeed_config, recipe.optimizer)
        return recipe

    def _check_quantized(self, model: ModelArguments) -> None:
        """Stop where frozen weights in few bits cannot serve."""
        given = f"quantize_base {model.lora.quantize_base}"
        if model.lora.lora_dim == 0:
            raise UserError(f"{given}: packed weights cannot train; add adapters with lora_dim")
        if self.train_base_model:
            raise UserError(f"{given}: packed weights cannot train; drop train_base_model")
        if model.zero_stage == 3:
            raise UserError(
                f"{given}: ZeRO-3 shards what weights it can gather, and packed ones it cannot; "
                "use zero_stage 0, 1 or 2"
            )
        require_package("bitsandbytes", "--quantize_base")

    def save_plan(self, model_name: str, recipe: Recipe, *inside: str) -> SavePlan:
        """What one model's folder will hold; it is output_dir, or each of these folders inside."""
        folders = (
            [Path(self.output_dir, name) for name in inside or ("",)] if self.output_dir else []
        )
        return plan_saving(
            self.lora_save,
            model_name,
            recipe.lora,
            train_base=recipe.train_base,
            output_dirs=folders,
        )

    def schedule(self, total_steps: int) -> Schedule:
        """The learning-rate schedule over so many optimizer steps."""
        return schedule_factory(self.lr_scheduler_type, self.num_warmup_steps, total_steps)

    def state_config(self) -> StateConfig:
        """When training states are written, and what the run resumes from."""
        states = self.states
        return StateConfig(
            output_dir=self.output_dir,
            save_steps=states.save_steps,
            save_total_limit=states.save_total_limit,
            resume=states.resume,
            with_new_rates=states.resume_with_new_rates,
        )

    def log_config(self, continued: Continued | None = None) -> LogConfig:
        """Where the run's figures go; a resumed run's continue those of another."""
        return LogConfig(
            output_dir=self.output_dir,
            tensorboard_dir=self.tensorboard_path if self.enable_tensorboard else None,
            wandb_project=self.wandb_project,
            log_every=self.log_every,
            continued=continued,
        )

    def engine_config(self, model: ModelArguments, dtype: str, micro_batch: int) -> EngineConfig:
        """DeepSpeed's numbers for one model."""
        return EngineConfig(
            zero_stage=model.zero_stage,
            dtype=dtype,
            offload=self.offload,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            gradient_clipping=self.gradient_clipping,
            user_config=self.deepspeed_config,
        )
