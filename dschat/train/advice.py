"""Rules of thumb for adapters, printed at the start where the settings contradict them."""

from __future__ import annotations

import math

from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim import FIRST_RATIO, OptimizerConfig, first_lora_rate

RATIO_RANGE = (8.0, 32.0)  # where the LoRA+ authors found the best ratios (arXiv:2402.12354)
PLAIN_LORA_RATES = 2.0
LARGE_DIM, CALIBRATED_ACCUMULATION = 128, 8


def lora_advice(
    lora: LoraConfig, rates: OptimizerConfig, engine: EngineConfig, world_size: int
) -> list[str]:
    """Write a line for each setting that contradicts a known rule of thumb; none stops a run."""
    if lora.lora_dim == 0:
        return []
    ratio = rates.loraplus_lr_ratio
    low, high = RATIO_RANGE
    lines = []
    if ratio < 1:
        lines.append(
            f"loraplus_lr_ratio {ratio:g} makes B learn more slowly than A, though B's update sums "
            f"over fewer terms and wants the larger rate: start from {FIRST_RATIO:g}"
        )
    elif not low <= ratio <= high:
        plain = " (1 is plain LoRA)" if ratio == 1 else ""
        lines.append(
            f"loraplus_lr_ratio {ratio:g}{plain} is outside {low:g} to {high:g}, where the authors "
            f"of LoRA+ found the best ratios: start from {FIRST_RATIO:g}"
        )
    lines += _about_rates(rates)
    if lora.lora_dim >= LARGE_DIM and world_size == 1 and engine.gradient_accumulation_steps == 1:
        lines.append(
            f"lora_dim {lora.lora_dim} on one device without accumulation: so many directions "
            "follow the noise of one small batch; gradient_accumulation_steps "
            f"{CALIBRATED_ACCUMULATION} is the setting that was calibrated"
        )
    if engine.dtype == "fp16":
        lines.append(
            "dtype fp16: the adapters' small gradients fall below what fp16 holds, and steps are "
            "skipped when it overflows: take bf16 where the device has it"
        )
    return [f"advice: {line}" for line in lines]


def _about_rates(rates: OptimizerConfig) -> list[str]:
    """Warn of adapters no faster than full fine-tuning, or of a ratio on plain LoRA's rate."""
    ratio, rate_A = rates.loraplus_lr_ratio, rates.lora_A_rate
    # Beside a rate of the adapters' own, the other one is that of what trains in full.
    full_rate = rates.base_rate if rates.lora_learning_rate is not None else rates.full_rate
    start = first_lora_rate(full_rate, ratio)
    raised = ratio > 1 and rate_A >= PLAIN_LORA_RATES * full_rate
    raised |= ratio > FIRST_RATIO and rate_A >= first_lora_rate(full_rate, FIRST_RATIO)
    if raised:
        return [
            f"loraplus_lr_ratio {ratio:g} raises B's rate to {ratio * rate_A:.3g}, and A's is "
            f"still {rate_A:.3g}: a larger ratio wants a smaller rate of A; start from "
            f"lora_learning_rate {start:.2g}"
        ]
    if rate_A * math.sqrt(ratio) <= full_rate:
        return [
            f"A and B learn at {rate_A:.3g} and {ratio * rate_A:.3g}, in the mean no faster than "
            f"full fine-tuning would ({full_rate:.3g}), and adapters start from two to three times "
            f"its rate: start from lora_learning_rate {start:.2g}"
        ]
    return []
