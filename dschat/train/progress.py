"""Log of steps 1 and 2: bar, console lines, metrics, throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from dschat.data.batches import Batch
from dschat.train import phases
from dschat.train.engine import Engine
from dschat.train.finite import GradientWatch, check_finite, finite_sum, gradients_of
from dschat.train.means import Means
from dschat.train.metrics import MetricLogger, StepLog, console_line
from dschat.train.model_config import ModelConfig
from dschat.train.overflow import skips
from dschat.train.transfer import numbers
from dschat.utils.distributed import print_rank_0
from dschat.utils.flops import Matrices
from dschat.utils.optim import group_rates
from dschat.utils.perf import Gpus, TrainingWork, print_throughput, throughput

Args = ParamSpec("Args")
Result = TypeVar("Result")
BatchT = TypeVar("BatchT", bound=Batch)


def training_work(engine: Engine, config: ModelConfig) -> TrainingWork:
    """Describe an engine's model for throughput, before any tokens are counted."""
    model = engine.module
    return TrainingWork(
        config=model.config,
        matrices=Matrices.of(model, model.config),
        lora_dim=config.lora.lora_dim,
        trains_base=config.train_base,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def timed(
    work: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
) -> tuple[Result, float]:
    """Return the result of `work(*args)` and the seconds it took."""
    start = time.perf_counter()
    return work(*args, **kwargs), time.perf_counter() - start


def batch_counts(
    micro_batches: Sequence[BatchT], targets: Callable[[BatchT], torch.Tensor]
) -> list[float]:
    """Count in this rank's micro-batches: the loss's targets, real tokens, sequences.

    On the host, where they were collated, it waits for no device.
    """
    counts = [0.0, 0.0, 0.0]
    for batch in micro_batches:
        rows = batch.attention_mask.unflatten(0, (-1, len(batch.real)))[:, batch.real]
        counts[0] += targets(batch).item()
        counts[1] += rows.sum().item()
        counts[2] += batch.sequences
    return counts


def finite_loss(
    step: int,
    losses: Sequence[torch.Tensor],
    targets: float,
    watch: GradientWatch | None = None,
) -> float:
    """Sum the loss of an optimizer step over micro-batches and ranks, before the step is made.

    Args:
        step: its number. losses: scalars, of this rank's micro-batches. targets: terms of the loss,
            on all ranks. watch: the engine's.

    Raises:
        UserError: on every rank, where the loss or a gradient is not finite.
    """
    gradients = gradients_of(watch)
    found, own = numbers([*losses, *gradients.total]), len(losses)
    loss = f"loss of optimizer step {step}"
    return finite_sum(loss, sum(found[:own]), sum(found[own:]), gradients, max(targets, 1.0))


@dataclass
class Interval:
    """Sums since a moment, over all ranks."""

    loss_sum: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    steps: float = 0.0
    more: Means = field(default_factory=Means)
    start: float = field(default_factory=time.perf_counter)

    def add(self, loss_sum: float, targets: float, tokens: float, samples: float) -> None:
        """Add one optimizer step."""
        self.loss_sum += loss_sum
        self.targets += targets
        self.tokens += tokens
        self.samples += samples
        self.steps += 1

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def of(self, work: TrainingWork) -> TrainingWork:
        """Fill the interval's tokens and sequences into the work."""
        return replace(work, tokens=int(self.tokens), samples=int(self.samples))

    def sums(self) -> dict[str, Any]:
        """State for a checkpoint: the start counts from now."""
        return {**asdict(self), "start": -self.seconds}

    @classmethod
    def resumed(cls, sums: dict[str, Any]) -> Interval:
        """Restore an interval; the time between the two processes does not count."""
        interval = cls(**{**sums, "more": Means(**sums["more"])})
        interval.start += time.perf_counter()
        return interval


class Watch(Protocol):
    """Looks at figures for what goes wrong."""

    def advice(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Return a line to print, or None."""
        ...


class TrainingLog(StepLog):
    """Collects the figures of every optimizer step and shows them now and then."""

    per_rank = False  # its state

    def __init__(
        self,
        metrics: MetricLogger,
        engine: Engine,
        config: ModelConfig,
        gpus: Gpus,
        total_steps: int,
        watch: Watch | None = None,
    ):
        super().__init__(metrics, total_steps, "train")
        self.engine, self.gpus, self.watch = engine, gpus, watch
        self.work, self.total_steps = training_work(engine, config), total_steps
        self._rates = group_rates(engine.optimizer)
        self._since_log = Interval()
        self._since_evaluation = Interval()

    def step(
        self, step: int, loss_sum: float, counts: Sequence[float], more: Means | None = None
    ) -> None:
        """Add one optimizer step: its summed loss, `batch_counts` and more means, over all ranks.

        Raises:
            UserError: the norm of its gradients, taken of all ranks together, was not finite.
        """
        norm = self.engine.get_global_grad_norm()
        # With fp16 the search for a loss scale skips such steps; elsewhere nobody would hear of it.
        if norm is not None and (self.engine.was_step_applied() or not self.engine.fp16_enabled()):
            check_finite(float(norm), f"gradient norm of optimizer step {step}")
        for interval in (self._since_log, self._since_evaluation):
            interval.add(loss_sum, *counts)
        if more is not None:
            self._since_log.more.add(more)
        self.bar.update(1)
        phases.mark(phases.TRAINING)
        # The schedule has moved on by now: the rates of this step were read before it.
        rates, self._rates = self._rates, group_rates(self.engine.optimizer)
        if not self.metrics.is_due(step, self.total_steps):
            return
        values = self._means(self._since_log) | skips(self.engine)
        rates = {f"lr/{name}": rate for name, rate in rates.items()}
        self.metrics.log(
            step, values | rates | ({} if norm is None else {"grad_norm": float(norm)})
        )
        shown = {"loss": values["loss"]} | rates | {"tokens/s": values["tokens_per_s"]}
        self.bar.show(shown)
        self._since_log = Interval()
        self._advise(step, values)

    def print_loss(self, step: int, loss_sum: float, counts: Sequence[float]) -> None:
        """Print the mean loss of one optimizer step."""
        mean = loss_sum / max(counts[0], 1.0)
        print_rank_0(f"step {step}/{self.total_steps} | loss {mean:.4f}")

    def _advise(self, step: int, figures: Mapping[str, float]) -> None:
        line = self.watch.advice(step, figures) if self.watch is not None else None
        if line is not None:
            self.say(f"advice: step {step}: {line}")
            self.metrics.warn(step, line)

    def _means(self, interval: Interval) -> dict[str, float]:
        """Mean loss and speed."""
        seconds = interval.seconds
        speed = throughput(interval.of(self.work), seconds, self.gpus)
        return {
            "loss": interval.loss_sum / max(interval.targets, 1.0),
            "tokens_per_s": speed.tokens_per_s,
            "samples_per_s": speed.samples_per_s,
            "tflops_per_gpu": speed.tflops_per_gpu,
            "seconds_per_step": seconds / interval.steps,
            **interval.more.values(),
        }

    def evaluation(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Show an evaluation, and the throughput of training since the last one.

        Args:
            seconds: of the evaluation itself, which do not count as training.

        Raises:
            UserError: its loss is not finite.
        """
        self.bar.clear()
        phases.mark(phases.EVALUATION)
        since = self._since_evaluation
        if since.steps:
            training = since.seconds - seconds
            print_throughput(since.of(self.work), training, self.gpus, self.metrics.rank)
        print_rank_0("eval " + console_line(step, self.total_steps, values))
        self.metrics.log(step, values, kind="eval")
        self._since_evaluation = Interval()
        check_finite(values["loss"], f"evaluation loss after {step} optimizer steps")
        self._advise(step, values)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sums since the last figures, of which the next ones will be means."""
        return {"log": self._since_log.sums(), "evaluation": self._since_evaluation.sums()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Continue from those sums, and from the rates of the restored optimizer."""
        self._since_log = Interval.resumed(state["log"])
        self._since_evaluation = Interval.resumed(state["evaluation"])
        self._rates = group_rates(self.engine.optimizer)
