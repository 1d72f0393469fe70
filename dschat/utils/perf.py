"""Throughput of training and generation: numbers in, numbers out; one printed line each.

TFLOPs are by the formula of the Megatron paper, the one DeepSpeed-Chat prints, per GPU. MFU is the
share of the GPU's peak that an exact count of the model's matrix products takes (`flops.py`).
Tokens are real ones (sums of masks), and everything counted is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dschat.utils.flops import (
    Matrices,
    activation_factor,
    calculate_flops,
    causal_pairs,
    forward_flops,
    generation_flops,
    get_hf_configs,
    peak_tflops,
    training_flops,
)
from dschat.utils.flops import lora_overhead_factor as lora_overhead_factor
from dschat.utils.predecessor import changed
from dschat.utils.printable import fitted, window


@dataclass(frozen=True)
class Gpus:
    """The devices of a run: their number, the dtype they compute in, and the name of their kind."""

    world_size: int
    dtype: torch.dtype
    name: str | None = None  # torch.cuda.get_device_name(); None on a CPU

    def tflops(self, flops: float, seconds: float) -> float:
        """Convert FLOPs of all GPUs to TFLOPs per GPU; ValueError for a duration of 0 or less."""
        if seconds <= 0:
            raise ValueError(f"{seconds} seconds: a duration is above 0")
        return flops / (seconds * self.world_size * 1e12)

    def mfu(self, flops: float | None, seconds: float) -> float | None:
        """Return the share of the peak, 0 to 1; None where the count or the peak is unknown."""
        peak = peak_tflops(self.name, self.dtype)
        return None if flops is None or peak is None else self.tflops(flops, seconds) / peak


@dataclass(frozen=True)
class TrainingWork:
    """Training of one model on all ranks: real tokens and sequences, each pass counted.

    Several epochs over the same batch count several times; a role that rests has none of either.

    Attributes:
        config: the `transformers` config. matrices: None where there is no exact count.
        trains_base: with LoRA, the base trains as well.
    """

    config: Any
    matrices: Matrices | None
    lora_dim: int = 0
    trains_base: bool = False
    gradient_checkpointing: bool = False
    tokens: int = 0
    samples: int = 0

    @property
    def megatron_flops(self) -> float:
        """FLOPs by the Megatron formula; 0 for a role that rested."""
        if self.samples == 0:
            return 0.0
        # The weight gradients that LoRA saves are spent after all where the base trains beside it.
        lora_dim = 0 if self.trains_base else self.lora_dim
        hidden = get_hf_configs(self.config).hidden_size
        factor = activation_factor(lora_dim, hidden, self.gradient_checkpointing)
        return calculate_flops(factor, self.samples, self.tokens / self.samples, self.config)

    @property
    def exact_flops(self) -> float | None:
        """FLOPs forward and backward by the exact count."""
        if self.matrices is None:
            return None
        pairs = self.samples * causal_pairs(self.tokens / max(self.samples, 1))
        return sum(training_flops(self.matrices, self.tokens, pairs))


@dataclass(frozen=True)
class RolloutWork:
    """Generation on all ranks; `steps` are the decoding steps of one rank, in sequence."""

    prompt_tokens: int
    new_tokens: int
    samples: int
    steps: int


@dataclass(frozen=True)
class Step3Times:
    """Wall-clock seconds of one PPO iteration; scoring is what end_to_end has beside the two."""

    generation: float
    training: float
    end_to_end: float


@dataclass(frozen=True)
class Throughput:
    """Speed of training; `mfu` (0 to 1) is None where the architecture or the peak is unknown."""

    tokens_per_s: float
    samples_per_s: float
    tflops_per_gpu: float
    mfu: float | None


@dataclass(frozen=True)
class Step3Throughput:
    """Speed of one PPO iteration: end to end, generation, training.

    Attributes:
        tflops_per_gpu: of generation and training; the exact count of `mfu` has scoring as well.
        weights_gb_per_s: what decoding reads of the matrices on each GPU; None for a mixture of
            experts, of which a batch reads as many as its tokens meet.
    """

    tflops_per_gpu: float
    mfu: float | None
    generation_tflops_per_gpu: float
    weights_gb_per_s: float | None
    training_tflops_per_gpu: float


def throughput(work: TrainingWork, seconds: float, gpus: Gpus) -> Throughput:
    """Return the speed of a stretch of training that took `seconds`; ValueError below 0 or at it.

    Attention is counted at the mean length, which for unequal lengths is slightly too low.
    """
    return Throughput(
        tflops_per_gpu=gpus.tflops(work.megatron_flops, seconds),
        mfu=gpus.mfu(work.exact_flops, seconds),
        tokens_per_s=work.tokens / seconds,
        samples_per_s=work.samples / seconds,
    )


def step3_throughput(
    actor: TrainingWork,
    critic: TrainingWork | None,
    rollout: RolloutWork,
    times: Step3Times,
    gpus: Gpus,
) -> Step3Throughput:
    """Return the speed of one PPO iteration; the works are global, the times those of one rank.

    A reward model counts as the critic's trunk does; without a critic it is left out.
    """
    works = [actor] if critic is None else [actor, critic]
    length = (rollout.prompt_tokens + rollout.new_tokens) / rollout.samples
    generation = calculate_flops(1, rollout.samples, length, actor.config)
    training = sum(work.megatron_flops for work in works)
    weights = None
    if actor.matrices is not None and not actor.matrices.mixture:
        read = (actor.matrices.trunk + actor.matrices.head) * gpus.dtype.itemsize
        weights = read * rollout.steps / times.generation / 1e9
    return Step3Throughput(
        tflops_per_gpu=gpus.tflops(generation + training, times.end_to_end),
        mfu=gpus.mfu(_exact_step3(works, rollout), times.end_to_end),
        generation_tflops_per_gpu=gpus.tflops(generation, times.generation),
        weights_gb_per_s=weights,
        training_tflops_per_gpu=gpus.tflops(training, times.training),
    )


@changed("print_throughput(TrainingWork(...), seconds, gpus)", seconds=(int, float))
def print_throughput(work: TrainingWork, seconds: float, gpus: Gpus, rank: int = 0) -> str:
    """Print the speed of steps 1 and 2 in one line on rank 0, and return the line."""
    speed = throughput(work, seconds, gpus)
    return _print(
        f"Latency {seconds:.3f} s | {speed.tokens_per_s:,.0f} tokens/s | "
        f"{speed.samples_per_s:.2f} samples/s | {speed.tflops_per_gpu:.3f} Megatron TFLOPs/GPU"
        + _mfu_text(" | ", speed.mfu),
        rank,
    )


@changed("print_throughput_step3(actor_work, critic_work, rollout, times, gpus)")
def print_throughput_step3(
    actor: TrainingWork,
    critic: TrainingWork | None,
    rollout: RolloutWork,
    times: Step3Times,
    gpus: Gpus,
    rank: int = 0,
) -> str:
    """Print the speed of one PPO iteration in one line on rank 0, and return the line."""
    speed = step3_throughput(actor, critic, rollout, times, gpus)
    weights = speed.weights_gb_per_s
    return _print(
        f"End-to-end {times.end_to_end:.3f} s, {rollout.samples / times.end_to_end:.2f} samples/s, "
        f"{speed.tflops_per_gpu:.3f} Megatron TFLOPs/GPU{_mfu_text(', ', speed.mfu)} | "
        f"Generation {times.generation:.3f} s, {rollout.new_tokens:,} tokens, "
        f"{rollout.new_tokens / times.generation:,.0f} tokens/s, "
        f"{1e3 * times.generation / rollout.steps:.2f} ms/step, "
        f"{speed.generation_tflops_per_gpu:.3f} Megatron TFLOPs/GPU"
        f"{'' if weights is None else f', weights read at {weights:.1f} GB/s'} | "
        f"Training {times.training:.3f} s, "
        f"{speed.training_tflops_per_gpu:.3f} Megatron TFLOPs/GPU",
        rank,
    )


def _print(line: str, rank: int) -> str:
    if rank <= 0:
        print(fitted(line, window()), flush=True)
    return line


def _exact_step3(works: Sequence[TrainingWork], rollout: RolloutWork) -> float | None:
    """Count generation, scoring and training; the first work is the actor's."""
    matrices = [work.matrices for work in works if work.matrices is not None]
    if len(matrices) < len(works):
        return None
    tokens = rollout.prompt_tokens + rollout.new_tokens
    pairs = rollout.samples * causal_pairs(tokens / rollout.samples)
    sizes = (rollout.prompt_tokens, rollout.new_tokens, rollout.samples)
    total = generation_flops(matrices[0], *sizes)
    for m in matrices:
        # Actor and reference score each rollout once, and so do critic and reward model; the
        # reference and the reward model run without adapters.
        total += forward_flops(m, tokens, pairs, tokens)
        total += forward_flops(m, tokens, pairs, tokens, adapters=False)
    return total + sum(work.exact_flops or 0.0 for work in works)


def _mfu_text(before: str, mfu: float | None) -> str:
    """Put the share of the peak after `before`; nothing where it is not known."""
    return "" if mfu is None else f"{before}MFU {100 * mfu:.1f} % (exact count)"
