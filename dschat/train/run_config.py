"""Settings of a training run, and of each model in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.models.attention import IMPLEMENTATIONS
from dschat.settings import Settings, group, setting
from dschat.train import checkpoint_folder, run_lock
from dschat.train.checkpoint_config import CheckpointConfig
from dschat.train.checkpoint_folder import checkpoints_in, continues, folder_of
from dschat.train.hub import HubConfig
from dschat.train.model_config import ModelConfig
from dschat.train.optimizer_block import check_optimizer_block
from dschat.train.steps import StepPlan
from dschat.train.trackers import LogConfig, require_package
from dschat.utils.distributed import RANK_TIMEOUT, from_main, print_rank_0
from dschat.utils.ds_utils import DTYPES, EngineConfig, EngineSettings
from dschat.utils.schedules import SCHEDULES, Schedule, schedule_factory

if TYPE_CHECKING:
    from dschat.models.save_plan import SavePlan
    from dschat.train.disk import Written


@dataclass(frozen=True)
class StartConfig(Settings):
    """Settings of every program that loads a model: seed, precision, end token."""

    seed: int = setting(1234, "seed of data order, splits, initialisation and sampling", at_least=0)
    dtype: str = setting(
        "auto", "auto is bf16 where the device has it", choices=("auto", *DTYPES), may_change=True
    )
    add_eot_token: bool = setting(False, "end answers with --eot_token instead of the eos")
    eot_token: str = setting("<|endoftext|>", "the token of --add_eot_token")
    verbose: bool = setting(False, "show what the libraries say as well", may_change=True)
    rank_timeout: int = setting(
        RANK_TIMEOUT,
        "seconds after which a rank that others wait for ends the run",
        at_least=1,
        may_change=True,
    )

    @property
    def answer_end(self) -> str | None:
        """Token that ends answers in place of the tokenizer's eos."""
        return self.eot_token if self.add_eot_token else None


@dataclass(frozen=True)
class RunConfig(StartConfig):
    """Settings of every recipe."""

    output_dir: str = setting("./output", "where the trained model is written", may_change=True)
    overwrite_output_dir: bool = setting(
        False, "replace a finished model in the output folder", may_change=True
    )
    ignore_plan: bool = setting(
        False, "start although the plan says that the GPUs are too small", may_change=True
    )
    num_train_epochs: int = setting(1, "passes over the training data", at_least=1, at_most=10_000)
    lr_scheduler_type: str = setting("cosine", "shape of the schedule", choices=tuple(SCHEDULES))
    num_warmup_steps: int | None = setting(
        0,
        "optimizer steps of linear warm-up (default: none; in step 3 100, or a tenth of a shorter "
        "run)",
        at_least=0,
    )
    only_optimize_lora: bool = setting(
        False, "train adapters and heads only (the default)", may_change=True
    )
    train_base_model: bool = setting(False, "with LoRA: train the base weights as well")
    lora_save: str = setting(
        "both",
        "with LoRA, write merged weights, the adapter in PEFT's format, or both",
        choices=("both", "merged", "adapter"),
    )
    attn_implementation: str | None = setting(
        None,
        "attention of every model (default: transformers' choice)",
        choices=tuple(IMPLEMENTATIONS),
    )
    deepspeed: bool = setting(False, "accepted: DeepSpeed is always used", may_change=True)
    local_rank: int = setting(-1, "accepted: the launcher's environment decides", may_change=True)
    compute_fp32_loss: bool = setting(False, "losses are always computed in fp32", retired=True)
    engine: EngineSettings = group(EngineSettings)
    log: LogConfig = group(LogConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    hub: HubConfig = group(HubConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_optimize_lora and self.train_base_model:
            raise UserError("only_optimize_lora and train_base_model contradict: drop one")

    def complete(self, model: ModelConfig) -> ModelConfig:
        """Add to a model's settings what the run decides for all of its models.

        Raises:
            UserError: an optimizer in the DeepSpeed JSON that contradicts them, or weights in few
                bits that could not train.
        """
        if model.lora.quantize_base is not None:
            self._check_quantized(model)
        if self.engine.deepspeed_config is not None:
            check_optimizer_block(self.engine.deepspeed_config, model.optimizer)
        return replace(model, train_base=self.train_base_model)

    def _check_quantized(self, model: ModelConfig) -> None:
        """Raise an error where frozen weights in few bits cannot serve."""
        place = f"quantize_base {model.lora.quantize_base}"
        if model.lora.lora_dim == 0:
            raise UserError(f"{place}: packed weights cannot train; add adapters with lora_dim")
        if self.train_base_model:
            raise UserError(f"{place}: packed weights cannot train; drop train_base_model")
        if model.zero_stage == 3:
            raise UserError(
                f"{place}: ZeRO-3 shards what weights it can gather, and packed ones it cannot; "
                "use zero_stage 0, 1 or 2"
            )
        require_package("bitsandbytes", "quantize_base")

    def save_plan(self, model_name: str, config: ModelConfig, *inside: str) -> SavePlan:
        """Plan the folder of one model: output_dir, or each of these folders inside it."""
        from dschat.models.save_plan import plan_saving

        plan = plan_saving(
            self.lora_save,
            model_name,
            config.lora,
            train_base=config.train_base,
            output_dirs=self._folders(inside),
        )
        if "critic" not in inside:
            self.hub.check_plan(plan, model_name)
        return plan

    def _folders(self, inside: Sequence[str]) -> list[Path]:
        return [Path(self.output_dir, name) for name in inside or ("",)]

    def check_output(self, *inside: str) -> None:
        """Stop, on every rank, where the models of this run could not be written; hold the folder.

        Args:
            inside: folders in the output folder that will hold them; none: it holds one itself.

        Raises:
            UserError: a folder that cannot be written, that another run holds, that has a finished
                model which this run neither continues nor may replace, or that not every rank sees.
        """
        from_main(partial(self._check_output, inside))
        if self.checkpoint.in_use:
            from dschat.train.shared_disk import check_shared

            check_shared(self.output_dir)

    def _check_output(self, inside: Sequence[str]) -> None:
        from dschat.models import placing
        from dschat.models.save import check_output_dir
        from dschat.models.save_plan import holds_model

        check_output_dir(self.output_dir)
        run_lock.hold(self.output_dir)
        self.log.check_writable()
        self.hub.check()
        left = [line for folder in self._folders(inside) for line in placing.repair(folder)]
        for line in (*left, *checkpoint_folder.repair(self.output_dir)):
            print_rank_0(line)
        if self.overwrite_output_dir or continues(self.output_dir, self.checkpoint.resume):
            return
        for folder in self._folders(inside):
            if holds_model(folder):
                raise UserError(
                    f"output_dir {self.output_dir}: {folder} holds a finished model; give another "
                    "output_dir, or overwrite_output_dir to replace it"
                )

    def check_disk(self, models: Iterable[Written], total_steps: int) -> None:
        """Stop where the disk is too small for these models and the checkpoints of the run."""
        from dschat.train.disk import check_disk

        checkpoint, present = self.checkpoint, checkpoints_in(folder_of(self.output_dir))
        count = 0
        if checkpoint.save_steps:
            made = total_steps // checkpoint.save_steps
            count = max(min(made, checkpoint.save_total_limit + 1) - len(present), 0)
        check_disk(self.output_dir, models, count)

    @property
    def warm_up(self) -> int:
        """Optimizer steps in which the learning rate rises."""
        return 0 if self.lr_scheduler_type == "constant" else self.num_warmup_steps or 0

    def remarks(self, steps: StepPlan, eval_interval: int) -> list[str]:
        """Say which intervals and epochs lie beyond the end of the run."""
        total, lines = steps.total_steps, []
        if self.checkpoint.save_steps > total:
            lines.append(
                f"save_steps {self.checkpoint.save_steps}: the run ends at step {total}, so "
                f"there will be no checkpoint; give fewer, such as {math.ceil(total / 2)}"
            )
        if eval_interval > total:
            lines.append(
                f"eval_interval {eval_interval}: the run ends at step {total}, so it is "
                "evaluated before it and after each epoch alone"
            )
        epochs = [sum(steps.epoch_steps[:n]) for n in range(1, len(steps.epoch_steps))]
        if epochs and total <= epochs[-1]:
            last = 1 + sum(total > end for end in epochs)
            lines.append(
                f"num_train_epochs {self.num_train_epochs}: the run ends in epoch {last}, at "
                f"step {total}"
            )
        return lines

    def schedule(self, total_steps: int) -> Schedule:
        """Learning-rate schedule over so many optimizer steps."""
        return schedule_factory(self.lr_scheduler_type, self.warm_up, total_steps)

    def engine_config(self, model: ModelConfig, dtype: str, micro_batch: int) -> EngineConfig:
        """Combine the run's engine settings with a model's stage, dtype and micro-batch."""
        return EngineConfig(
            **vars(self.engine),
            dtype=dtype,
            zero_stage=model.zero_stage,
            micro_batch_size=micro_batch,
        )
