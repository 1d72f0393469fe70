"""What a training run of steps 1 and 2 shows: bar, console lines, metrics, throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from dschat.train.engine import Recipe
from dschat.train.metrics import (
    Continued,
    MetricLogger,
    console_line,
    format_value,
    progress,
)
from dschat.utils.distributed import all_reduce_sum, print_rank_0
from dschat.utils.flops import Matrices
from dschat.utils.optim import group_rates
from dschat.utils.perf import Gpus, TrainingWork, print_throughput, throughput

Result = TypeVar("Result")


@dataclass(frozen=True)
class LogConfig:
    """Where figures go and how often."""

    output_dir: str | None = None
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    log_every: int = 10
    continued: Continued | None = None

    @property
    def first_step(self) -> int:
        """The steps that the run continued has made."""
        return 0 if self.continued is None else self.continued.step

    def open(self, is_main: bool) -> MetricLogger | None:
        """The run's metric files; None without an output folder."""
        if self.output_dir is None:
            return None
        return MetricLogger(
            self.output_dir,
            enabled_rank0=is_main,
            tensorboard_dir=self.tensorboard_dir,
            wandb_project=self.wandb_project,
            continued=self.continued,
        )


def training_work(engine: nn.Module, recipe: Recipe) -> TrainingWork:
    """Describe an engine's model for throughput, before any tokens are counted."""
    model = engine.module
    return TrainingWork(
        config=model.config,
        matrices=Matrices.of(model, model.config),
        lora_dim=recipe.lora.lora_dim,
        trains_base=recipe.train_base,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )


def timed(work: Callable[..., Result], *args: Any) -> tuple[Result, float]:
    """The result of `work(*args)` and the seconds it took."""
    start = time.perf_counter()
    return work(*args), time.perf_counter() - start


def batch_counts(window: Sequence[Any], targets: Callable[[Any], torch.Tensor]) -> list[float]:
    """Of this rank's micro-batches: what the loss is a mean over, real tokens, sequences."""
    counts = [0.0, 0.0, 0.0]
    for batch in window:
        rows = batch.attention_mask.unflatten(0, (-1, len(batch.real)))[:, batch.real]
        counts[0] += targets(batch).item()
        counts[1] += rows.sum().item()
        counts[2] += batch.sequences
    return counts


class TrainingLog:
    """Collects the figures of every optimizer step and shows them now and then."""

    per_rank = True  # its state: the loss is summed on each rank by itself

    def __init__(
        self,
        config: LogConfig,
        engine: nn.Module,
        work: TrainingWork,
        gpus: Gpus,
        total_steps: int,
        rank: int,
    ):
        self.config, self.engine, self.rank = config, engine, rank
        self.work, self.gpus, self.total_steps = work, gpus, total_steps
        self.metrics = config.open(is_main=rank == 0)
        self.bar = progress(
            total=total_steps, desc="train", enabled=rank == 0, initial=config.first_step
        )
        self._rates = group_rates(engine.optimizer)
        self._since_log = _Interval()
        self._since_evaluation = _Interval()

    def step(self, step: int, loss_sum: float, counts: Sequence[float]) -> None:
        """Note one optimizer step: this rank's summed loss, and `batch_counts` over all ranks."""
        for interval in (self._since_log, self._since_evaluation):
            interval.add(loss_sum, *counts)
        self.bar.update(1)
        # The schedule has moved on by now: what this step used was read before it.
        rates, self._rates = self._rates, group_rates(self.engine.optimizer)
        if step % self.config.log_every and step != self.total_steps:
            return
        values = self._since_log.values(self.work, self.gpus)
        norm = self.engine.get_global_grad_norm()
        rates = {f"lr/{n}": r for n, r in rates.items()}
        extra = {} if norm is None else {"grad_norm": float(norm)}
        if self.metrics is not None:
            self.metrics.log(step, values | rates | extra)
        shown = {"loss": values["loss"]} | rates | {"tokens/s": values["tokens_per_s"]}
        self.bar.set_postfix_str(", ".join(f"{n} {format_value(v)}" for n, v in shown.items()))
        self._since_log = _Interval()

    def evaluation(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Show an evaluation, and the throughput of the training since the last one."""
        self.bar.clear()
        if self._since_evaluation.steps:
            took = self._since_evaluation.seconds - seconds
            work = self._since_evaluation.of(self.work)
            print_throughput(work, took, self.gpus, self.rank)
        print_rank_0("eval " + console_line(step, self.total_steps, values), self.rank)
        if self.metrics is not None:
            self.metrics.log(step, values, kind="eval")
        self._since_evaluation = _Interval()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The sums since the last figures: what the next ones will be means of."""
        return {"log": self._since_log.sums(), "evaluation": self._since_evaluation.sums()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Go on from those sums, and from the rates of the restored optimizer."""
        self._since_log = _Interval.resumed(state["log"])
        self._since_evaluation = _Interval.resumed(state["evaluation"])
        self._rates = group_rates(self.engine.optimizer)

    def close(self) -> None:
        """Close the bar and every writer."""
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()


class _Interval:
    """Sums since a moment; the loss is this rank's, the counts are global."""

    def __init__(self):
        self.start = time.perf_counter()
        self.loss_sum = self.targets = self.tokens = self.samples = 0.0
        self.steps = 0

    def add(self, loss_sum: float, targets: float, tokens: float, samples: float) -> None:
        self.loss_sum += loss_sum
        self.targets += targets
        self.tokens += tokens
        self.samples += samples
        self.steps += 1

    def sums(self) -> dict[str, float]:
        return {**vars(self), "start": -self.seconds}

    @classmethod
    def resumed(cls, sums: dict[str, float]) -> _Interval:
        """An interval with these sums; the time between the two processes does not count."""
        interval = cls()
        start = interval.start + sums["start"]
        vars(interval).update(sums, start=start)
        return interval

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def of(self, work: TrainingWork) -> TrainingWork:
        """Count the interval's tokens and sequences into the work."""
        return replace(work, tokens=int(self.tokens), samples=int(self.samples))

    def values(self, work: TrainingWork, gpus: Gpus) -> dict[str, float]:
        """The interval's mean loss over all ranks and its speed."""
        seconds = self.seconds
        speed = throughput(self.of(work), seconds, gpus)
        return {
            "loss": all_reduce_sum([self.loss_sum])[0] / max(self.targets, 1.0),
            "tokens_per_s": speed.tokens_per_s,
            "samples_per_s": speed.samples_per_s,
            "tflops_per_gpu": speed.tflops_per_gpu,
            "seconds_per_step": seconds / self.steps,
        }
