"""Preparation of a run: everything before the training loop.

1. `setup_run`: dtype, tokenizer, process group, seed                      (every program)
2. `plan_model`: check output folder, model, training, without weights     (steps 1 and 2)
3. `RunContext.load_data` and `.loader`: tokenised rows, this rank's batches
4. `prepare`: plan the steps, find the checkpoint, load the model, build the engine
5. `Run.start`: open the log, seed this rank, restore the checkpoint
6. `Run.end`: note that the run is complete
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

from torch import nn
from transformers import PretrainedConfig

from dschat.data.batching import Loader
from dschat.data.datasets import PromptData
from dschat.data.stream import StreamLoader
from dschat.models.causal_lm import check_model_folder
from dschat.models.config import check_attention, load_config
from dschat.models.padding_proof import prove_padding
from dschat.models.reward_model import head_width
from dschat.models.save_plan import SavePlan
from dschat.settings import Settings
from dschat.train.checkpoint_source import Position
from dschat.train.checkpointer import Checkpointer, Stateful
from dschat.train.disk import Written, reserve
from dschat.train.engine import Engine, build_engine
from dschat.train.metrics import MetricLogger, StepLog
from dschat.train.model_config import ModelConfig
from dschat.train.progress import TrainingLog, Watch
from dschat.train.resume import RunPlan, model_files
from dschat.train.run_config import RunConfig
from dschat.train.run_context import RunContext
from dschat.train.step_settings import StepSettings
from dschat.train.steps import StepPlan
from dschat.train.trainable_tokens import asked_tokens, choose_tokens
from dschat.utils.distributed import print_rank_0, set_random_seed
from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.files import Reserve


@dataclass(frozen=True)
class ModelPlan:
    """One model to train, checked before its weights load; `later` are the folders it becomes."""

    name: str
    config: ModelConfig
    engine: EngineConfig
    save: SavePlan
    written: Written
    later: Reserve


def plan_model(
    ctx: RunContext, settings: StepSettings, build: Callable[[PretrainedConfig], nn.Module]
) -> ModelPlan:
    """Check a model and how it trains and is saved.

    Args:
        build: makes the module of a config; called on `meta`, without weights.

    Raises:
        UserError: settings that contradict each other, the model or the DeepSpeed JSON.
    """
    run, name = settings.run, settings.model_name_or_path
    rows = settings.batch.per_device_train_batch_size
    run.check_output()
    engine = run.engine_config(settings.model, ctx.dtype_name, rows)
    get_train_ds_config(engine, ctx.world_size)
    config = run.complete(settings.model)
    if settings.trains_head_only:
        config = config.of_head_alone(head_width(load_config(name)))
    config = replace(config, tokens=asked_tokens(config.trainable_tokens, ctx.tokenizer))
    check_model_folder(name, ctx.tokenizer)
    check_attention(run.attn_implementation, ctx.dtype_name, name)
    size = config.check(name, build)
    settings.check_model()
    save = run.save_plan(name, config)
    written = Written.of(size, engine, save)
    return ModelPlan(name, config, engine, save, written, reserve(run.output_dir, [written]))


class SavedWatch(Watch, Stateful, Protocol):
    """A watch whose state a checkpoint holds."""


@dataclass(frozen=True)
class PreparedRun:
    """A run whose engines are built.

    Attributes:
        MODEL: folder of the model that a hub gets, in the output folder.
        config: the part of the settings that every program has.
    """

    MODEL: ClassVar[str] = ""

    ctx: RunContext
    settings: Settings
    config: RunConfig
    steps: StepPlan
    checkpointer: Checkpointer

    def open_metrics(self) -> MetricLogger:
        """Open the metrics, which a resumed run goes on with."""
        config, continued = self.config, self.checkpointer.continued
        return MetricLogger(config.log, config.output_dir, self.ctx.rank, continued, self.settings)

    def end(self, log: StepLog) -> None:
        """Note that the run is complete, close the log, and push the model where that is asked."""
        self.checkpointer.mark_end()
        log.close()
        self.config.hub.push(Path(self.config.output_dir, self.MODEL), self.ctx.rank)


@dataclass(frozen=True)
class Run(PreparedRun):
    """A run of steps 1 or 2."""

    settings: StepSettings
    model: ModelPlan
    engine: Engine

    def start(
        self, watch: SavedWatch | None = None, **others: Stateful | None
    ) -> tuple[TrainingLog, Position]:
        """Open the log, seed this rank, and restore the checkpoint where the run resumes.

        Args:
            watch: what the log asks for advice. others: what else a checkpoint holds, by name.
        """
        ctx, config, total = self.ctx, self.model.config, self.steps.total_steps
        log = TrainingLog(self.open_metrics(), self.engine, config, ctx.gpus, total, watch)
        set_random_seed(ctx.seed + ctx.rank)
        return log, self.checkpointer.restore(
            {"model": self.engine}, {"log": log, "watch": watch, **others}
        )


def prepare(
    ctx: RunContext,
    settings: StepSettings,
    model: ModelPlan,
    data: PromptData,
    train_loader: Loader | StreamLoader,
    create: Callable[..., nn.Module],
) -> Run:
    """Plan the steps, find the checkpoint to resume from, load the model and build its engine.

    Args:
        create: loads the model's weights, as `create_hf_model` does.

    Raises:
        UserError: a checkpoint of another run, weights that do not fit, or a model that sees
            padding.
    """
    run = settings.run
    batches = [train_loader.batches_in(epoch) for epoch in range(run.num_train_epochs)]
    steps = StepPlan.of(batches, run.engine.gradient_accumulation_steps, settings.max_steps)
    optimizers = {"model": model.config.optimizer}
    files = model_files(settings)
    plan = RunPlan(
        settings.KIND, settings, optimizers, ctx.dtype_name, data.key, steps, model_files=files
    )
    checkpointer = Checkpointer(run.checkpoint, run.output_dir, plan, ctx)
    run.check_disk([model.written], steps.total_steps)
    lines = run.remarks(steps, settings.eval_interval)
    for line in (*lines, *settings.length(batches).advice()):
        print_rank_0(line)
    module = create(
        model.name,
        ctx.tokenizer,
        ctx.dtype,
        ds_config=get_train_ds_config(model.engine, ctx.world_size),
        dropout=settings.model.dropout,
        attn_implementation=run.attn_implementation,
    )
    schedule = run.schedule(steps.total_steps)
    tokens = choose_tokens(model.config.trainable_tokens, ctx.tokenizer, data)
    config = replace(model.config, tokens=tokens)
    engine = build_engine(module, model.engine, config, schedule, ctx.world_size, settings.KIND)
    prove_padding(engine, ctx.tokenizer, ctx.device, model.name)
    return Run(ctx, settings, run, steps, checkpointer, model, engine)
