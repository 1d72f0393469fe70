"""Flags that every step shares: output, precision, schedule, training states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dschat.config.models import ModelConfig
from dschat.errors import UserError
from dschat.models.save_plan import SavePlan, plan_saving
from dschat.settings import Settings, group, setting
from dschat.train.checkpoint_folder import NEWEST
from dschat.train.checkpointer import StateConfig
from dschat.train.engine import Recipe, Schedule, check_optimizer_block
from dschat.train.metrics import Continued, require_package
from dschat.train.progress import LogConfig
from dschat.utils.ds_utils import EngineConfig, EngineSettings
from dschat.utils.optim import SCHEDULES, schedule_factory


@dataclass(frozen=True)
class StateArguments(Settings):
    """Flags of training states: saving them, and resuming from one."""

    save_steps: int = setting(
        0,
        "steps (in step 3 iterations) between training states under OUTPUT_DIR/checkpoints; "
        "0: none",
    )
    save_total_limit: int = setting(1, "keep so many of them, the newest")
    resume: str | None = setting(
        None,
        "go on from this training state; without a value from the newest, if there is one",
        bare=NEWEST,
    )
    resume_with_new_rates: bool = setting(
        False, "resume with the learning rates and ratios given now, not the saved ones"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_steps < 0:
            raise UserError(f"save_steps is {self.save_steps}: give 0 (never) or more")
        if self.save_total_limit < 1:
            raise UserError(f"save_total_limit is {self.save_total_limit}: give at least 1")
        if self.resume_with_new_rates and self.resume is None:
            raise UserError("resume_with_new_rates: nothing is resumed; add --resume")


@dataclass(frozen=True)
class RunArguments(Settings):
    """Flags that every step shares."""

    output_dir: str | None = setting(None, "where the trained model is written")
    seed: int = setting(1234, "seed of data order, splits, initialisation and sampling")
    num_train_epochs: int = setting(1, "passes over the training data")
    lr_scheduler_type: str = setting("cosine", "shape of the schedule", choices=tuple(SCHEDULES))
    num_warmup_steps: int = setting(0, "optimizer steps of linear warm-up")
    only_optimize_lora: bool = setting(False, "train adapters and heads only (the default)")
    train_base_model: bool = setting(False, "with LoRA: train the base weights as well")
    lora_save: str = setting(
        "both",
        "with LoRA, write merged weights, the adapter in PEFT's format, or both",
        choices=("both", "merged", "adapter"),
    )
    enable_tensorboard: bool = setting(False, "write TensorBoard events")
    tensorboard_path: str = setting("tensorboard", "folder of the TensorBoard events")
    wandb_project: str | None = setting(None, "log to this Weights & Biases project")
    add_eot_token: bool = setting(False, "end answers with --eot_token instead of the eos")
    eot_token: str = setting("<|endoftext|>", "the token of --add_eot_token")
    log_every: int = setting(10, "optimizer steps between metrics")
    deepspeed: bool = setting(False, "accepted: DeepSpeed is always used")
    local_rank: int = setting(-1, "accepted: the launcher's environment decides")
    compute_fp32_loss: bool = setting(False, "losses are always computed in fp32", retired=True)
    engine: EngineSettings = group(EngineSettings)
    states: StateArguments = group(StateArguments)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_train_epochs", "log_every"):
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

    def recipe(self, model: ModelConfig) -> Recipe:
        """How one model trains; the optimizer of a DeepSpeed JSON must agree with the flags."""
        recipe = Recipe(
            optimizer=model.optimizer,
            lora=model.lora,
            train_base=self.train_base_model,
            gradient_checkpointing=model.gradient_checkpointing,
        )
        if model.lora.quantize_base is not None:
            self._check_quantized(model)
        if self.engine.deepspeed_config is not None:
            check_optimizer_block(self.engine.deepspeed_config, recipe.optimizer)
        return recipe

    def _check_quantized(self, model: ModelConfig) -> None:
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

    def engine_config(self, model: ModelConfig, dtype: str, micro_batch: int) -> EngineConfig:
        """The engine of one model: the run's flags, the model's stage, and what is known now."""
        own = {"dtype": dtype, "zero_stage": model.zero_stage, "micro_batch_size": micro_batch}
        return EngineConfig(**{**vars(self.engine), **own})
