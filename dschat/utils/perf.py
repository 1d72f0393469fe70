"""Throughput of training and generation: numbers in, numbers out; one printed line each.

Two figures for speed, which the lines name: "Megatron TFLOPs" from the formula of that paper (the
one DeepSpeed-Chat prints) and "model TFLOPs" from the exact count, whose share of the GPU's peak is
MFU. Tokens are real ones (sums of masks) and everything counted is global; TFLOPs are per GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dschat.utils.flops import (
    ModelFlops,
    ModelShape,
    activation_factor,
    calculate_flops,
    causal_pairs,
    forward_flops,
    generation_flops,
    get_hf_configs,
    has_exact_count,
    model_flops,
)
from dschat.utils.flops import lora_overhead_factor as lora_overhead_factor
from dschat.utils.gpu_peaks import peak_tflops


@dataclass(frozen=True)
class Gpus:
    """Where the work ran: how many GPUs, the dtype it computed in, and the device's name."""

    world_size: int
    dtype: torch.dtype
    name: str | None = None  # torch.cuda.get_device_name(); None on a CPU


@dataclass(frozen=True)
class TrainingWork:
    """What one stretch of training did on all ranks: real tokens and sequences, each pass counted.

    Several epochs over the same batch count several times; a role that rests has none of either.
    `base_trainable` is for LoRA beside a base that trains; by default LoRA freezes it. `value_head`
    is for reward models and critics.
    """

    config: Any
    tokens: int
    samples: int
    lora_dim: int = 0
    base_trainable: bool | None = None
    gradient_checkpointing: bool = False
    value_head: bool = False


@dataclass(frozen=True)
class RolloutWork:
    """What generation did on all ranks; `steps` is the decoding steps of one rank, in sequence."""

    config: Any
    prompt_tokens: int
    new_tokens: int
    samples: int
    steps: int
    lora_dim: int = 0


@dataclass(frozen=True)
class Step3Times:
    """Wall-clock seconds of one PPO step; scoring is what end_to_end has beside the two."""

    generation: float
    training: float
    end_to_end: float


@dataclass(frozen=True)
class Throughput:
    """Speed of training; the last three are None where the architecture or the peak is unknown."""

    seconds: float
    tokens_per_s: float
    samples_per_s: float
    tflops_per_gpu: float  # Megatron formula
    model_tflops_per_gpu: float | None  # exact count, forward + backward
    hardware_tflops_per_gpu: float | None  # exact count, recomputation included
    mfu: float | None  # model TFLOPs over the peak, 0 to 1


@dataclass(frozen=True)
class Step3Throughput:
    """Speed of one PPO step: end to end, generation, training."""

    seconds: float
    samples_per_s: float
    tflops_per_gpu: float  # Megatron formula: generation and training, without scoring
    model_tflops_per_gpu: float | None  # exact count: generation, four scoring passes, training
    mfu: float | None
    generation_seconds: float
    new_tokens: int
    new_tokens_per_s: float
    ms_per_decoding_step: float
    generation_tflops_per_gpu: float  # Megatron formula, forward only
    weights_gb_per_s: float | None  # what decoding reads of the matrices on each GPU
    training_seconds: float
    training_tflops_per_gpu: float  # Megatron formula, actor and critic


def throughput(work: TrainingWork, seconds: float, gpus: Gpus) -> Throughput:
    """Return the speed of a stretch of training that took `seconds`; ValueError below 0 or at it.

    Attention is counted at the mean length, which for unequal lengths is slightly too low.
    """
    exact = _exact_training(work)
    per_gpu = 1 / (_positive(seconds) * gpus.world_size * 1e12)
    model = None if exact is None else exact.model * per_gpu
    return Throughput(
        seconds=seconds,
        tokens_per_s=work.tokens / seconds,
        samples_per_s=work.samples / seconds,
        tflops_per_gpu=_megatron_training(work) * per_gpu,
        model_tflops_per_gpu=model,
        hardware_tflops_per_gpu=None if exact is None else exact.hardware * per_gpu,
        mfu=_share_of_peak(model, gpus),
    )


def step3_throughput(
    actor: TrainingWork,
    critic: TrainingWork | None,
    rollout: RolloutWork,
    times: Step3Times,
    gpus: Gpus,
) -> Step3Throughput:
    """Return the speed of one PPO step; the works are global, the times those of one rank.

    A reward model counts as the critic's trunk does; without a critic it is left out.
    """
    for seconds in (times.generation, times.training, times.end_to_end):
        _positive(seconds)
    length = (rollout.prompt_tokens + rollout.new_tokens) / rollout.samples
    generation = calculate_flops(1, rollout.samples, length, rollout.config)
    training = sum(_megatron_training(work) for work in (actor, critic) if work is not None)
    exact = _exact_step3(actor, critic, rollout)
    gpu_flops = gpus.world_size * 1e12
    model = None if exact is None else exact / (times.end_to_end * gpu_flops)
    weights = None
    if has_exact_count(rollout.config):
        read = ModelShape.from_config(rollout.config).matmul_params * gpus.dtype.itemsize
        weights = read * rollout.steps / times.generation / 1e9
    return Step3Throughput(
        seconds=times.end_to_end,
        samples_per_s=rollout.samples / times.end_to_end,
        tflops_per_gpu=(generation + training) / (times.end_to_end * gpu_flops),
        model_tflops_per_gpu=model,
        mfu=_share_of_peak(model, gpus),
        generation_seconds=times.generation,
        new_tokens=rollout.new_tokens,
        new_tokens_per_s=rollout.new_tokens / times.generation,
        ms_per_decoding_step=1e3 * times.generation / rollout.steps,
        generation_tflops_per_gpu=generation / (times.generation * gpu_flops),
        weights_gb_per_s=weights,
        training_seconds=times.training,
        training_tflops_per_gpu=training / (times.training * gpu_flops),
    )


def print_throughput(work: TrainingWork, seconds: float, gpus: Gpus, rank: int = 0) -> str:
    """Print the speed of steps 1 and 2 in one line on rank 0, and return the line."""
    speed = throughput(work, seconds, gpus)
    line = (
        f"Latency {seconds:.3f} s | {speed.tokens_per_s:,.0f} tokens/s | "
        f"{speed.samples_per_s:.2f} samples/s | "
        f"{speed.tflops_per_gpu:.3f} Megatron TFLOPs/GPU | "
        f"{_exact_text(speed.model_tflops_per_gpu, speed.mfu, work.config, gpus)}"
    )
    if rank <= 0:
        print(line, flush=True)
    return line


def print_throughput_step3(
    actor: TrainingWork,
    critic: TrainingWork | None,
    rollout: RolloutWork,
    times: Step3Times,
    gpus: Gpus,
    rank: int = 0,
) -> str:
    """Print the speed of one PPO step in one line on rank 0, and return the line."""
    speed = step3_throughput(actor, critic, rollout, times, gpus)
    weights = speed.weights_gb_per_s
    bandwidth = "n/a" if weights is None else f"{weights:.1f}"
    line = (
        f"End-to-end {speed.seconds:.3f} s, {speed.samples_per_s:.2f} samples/s, "
        f"{speed.tflops_per_gpu:.3f} Megatron TFLOPs/GPU, "
        f"{_exact_text(speed.model_tflops_per_gpu, speed.mfu, rollout.config, gpus)} | "
        f"Generation {speed.generation_seconds:.3f} s, {speed.new_tokens:,} tokens, "
        f"{speed.new_tokens_per_s:,.0f} tokens/s, {speed.ms_per_decoding_step:.2f} ms/step, "
        f"{speed.generation_tflops_per_gpu:.3f} Megatron TFLOPs/GPU, "
        f"weights read at {bandwidth} GB/s | "
        f"Training {speed.training_seconds:.3f} s, "
        f"{speed.training_tflops_per_gpu:.3f} Megatron TFLOPs/GPU"
    )
    if rank <= 0:
        print(line, flush=True)
    return line


def _megatron_training(work: TrainingWork) -> float:
    if work.samples == 0:  # a role that rested
        return 0.0
    # The weight gradients that LoRA saves are spent after all where the base trains beside it.
    lora_dim = 0 if work.base_trainable else work.lora_dim
    hidden = get_hf_configs(work.config).hidden_size
    factor = activation_factor(lora_dim, hidden, work.gradient_checkpointing)
    return calculate_flops(factor, work.samples, work.tokens / work.samples, work.config)


def _exact_training(work: TrainingWork) -> ModelFlops | None:
    if not has_exact_count(work.config):
        return None
    return model_flops(
        ModelShape.from_config(work.config, work.value_head),
        work.tokens,
        work.samples * causal_pairs(work.tokens / work.samples) if work.samples else 0.0,
        lora_dim=work.lora_dim,
        base_trainable=work.base_trainable,
        gradient_checkpointing=work.gradient_checkpointing,
    )


def _exact_step3(
    actor: TrainingWork, critic: TrainingWork | None, rollout: RolloutWork
) -> float | None:
    works = [work for work in (actor, critic) if work is not None]
    trained = [_exact_training(work) for work in works]
    if None in trained:
        return None
    actor_shape = ModelShape.from_config(actor.config)
    tokens = rollout.prompt_tokens + rollout.new_tokens
    pairs = rollout.samples * causal_pairs(tokens / rollout.samples)
    # Actor and reference score each rollout once, and so do critic and reward model; the reference
    # and the reward model run without adapters.
    scored = 0.0
    for work in works:
        shape = ModelShape.from_config(work.config, work.value_head)
        scored += forward_flops(shape, tokens, pairs, tokens, work.lora_dim)
        scored += forward_flops(shape, tokens, pairs, tokens)
    generated = generation_flops(
        actor_shape, rollout.prompt_tokens, rollout.new_tokens, rollout.samples, rollout.lora_dim
    )
    return generated + scored + sum(work.model for work in trained)


def _share_of_peak(model_tflops: float | None, gpus: Gpus) -> float | None:
    peak = peak_tflops(gpus.name, gpus.dtype)
    return None if model_tflops is None or peak is None else model_tflops / peak


def _exact_text(tflops: float | None, mfu: float | None, config: Any, gpus: Gpus) -> str:
    if tflops is None:
        return f"model TFLOPs n/a (no exact count for {config.model_type})"
    if mfu is None:
        dtype = str(gpus.dtype).removeprefix("torch.")
        return f"{tflops:.3f} model TFLOPs/GPU, MFU n/a (no {dtype} peak for {gpus.name or 'CPU'})"
    return f"{tflops:.3f} model TFLOPs/GPU, MFU {100 * mfu:.1f} %"


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError(f"{seconds} seconds: a duration is above 0")
    return seconds
