"""Preparation of a run: everything before the training loop.

1. `setup_run`: dtype, tokenizer, process group, seed                      (every program)
2. `plan_model`: check output folder, model, training, without weights     (steps 1 and 2)
3. `RunContext.load_data` and `.loader`: tokenised rows, this rank's batches
4. `prepare`: plan the steps, find the checkpoint, load the model, build the engine
5. `Run.start`: open the log, seed this rank, restore the checkpoint
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dschat.data.batching import BatchSampler, Loader, build_loader
from dschat.data.config import DataConfig
from dschat.data.datasets import PromptData, create_prompt_dataset
from dschat.data.stream import RowStream, StreamLoader
from dschat.models.causal_lm import check_model_folder
from dschat.models.config import check_attention, check_kind, load_config
from dschat.models.reward_model import head_width
from dschat.models.save_plan import SavePlan
from dschat.text.formats import CONFIG_KEY, describe_format, set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train import phases
from dschat.train.checkpointer import Checkpointer, Position, Stateful
from dschat.train.disk import Written, reserve
from dschat.train.engine import Engine, build_engine, resolve_dtype, torch_dtype
from dschat.train.metrics import MetricLogger
from dschat.train.model_config import ModelConfig
from dschat.train.progress import TrainingLog, Watch
from dschat.train.resume import RunPlan, model_files
from dschat.train.run_config import StartConfig, StepSettings
from dschat.train.steps import StepPlan
from dschat.train.trainable_tokens import asked_tokens, choose_tokens
from dschat.utils.distributed import (
    Distributed,
    init_distributed,
    print_rank_0,
    set_random_seed,
)
from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.files import Reserve
from dschat.utils.perf import Gpus
from dschat.utils.waiting import from_local_main


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
    *,
    prompt_format: str | None = None,
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
class Run:
    """A run of steps 1 or 2 whose engine is built."""

    ctx: RunContext
    settings: StepSettings
    model: ModelPlan
    steps: StepPlan
    engine: Engine
    checkpointer: Checkpointer

    def start(
        self, watch: SavedWatch | None = None, **others: Stateful | None
    ) -> tuple[TrainingLog, Position]:
        """Open the log, seed this rank, and restore the checkpoint where the run resumes.

        Args:
            watch: what the log asks for advice. others: what else a checkpoint holds, by name.
        """
        run, ctx = self.settings.run, self.ctx
        continued = self.checkpointer.continued
        metrics = MetricLogger(run.log, run.output_dir, ctx.rank, continued, self.settings)
        log = TrainingLog(
            metrics, self.engine, self.model.config, ctx.gpus, self.steps.total_steps, watch
        )
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
        UserError: a checkpoint of another run, or weights that do not fit.
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
    return Run(ctx, settings, model, steps, engine, checkpointer)
