"""Rules of thumb for adapters, printed at the start where the settings contradict them."""

from __future__ import annotations

import math

from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import FIRST_RATIO, OptimizerConfig, first_lora_rate

RATIO_RANGE = (8.0, 32.0)  # where the LoRA+ authors found the best ratios (arXiv:2402.12354)
# A rate of full fine-tuning speaks of models of up to so many times its model's size, or as small.
NEAR_SIZE = 4.0
PLAIN_LORA_SHARE = 2 / 3  # of what adapters start from: plain LoRA's rate at the least
LARGE_DIM, CALIBRATED_ACCUMULATION = 128, 8


def lora_advice(
    lora: LoraConfig,
    rates: OptimizerConfig,
    engine: EngineConfig,
    world_size: int,
    parameters: float,
) -> list[str]:
    """Write a line for each setting that contradicts a known rule of thumb; none stops a run.

    Args:
        parameters: of the model, adapters left out: rates are known for some sizes alone.
    """
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
    lines += _about_rates(rates, lora.scaling, parameters)
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


def _about_rates(rates: OptimizerConfig, scaling: float, parameters: float) -> list[str]:
    """Warn of adapters no faster than full fine-tuning, or of a ratio on plain LoRA's rate.

    DeepSpeed-Chat starts adapters from two to three times the rate of full fine-tuning; "LoRA
    Without Regret" (Schulman et al. 2025) finds about ten times the best at alpha 32, at any rank.
    Beside a rate of the adapters' own, the other one given is that of what trains in full.
    """
    if rates.learning_rate is not None and rates.lora_learning_rate is not None:
        full_rate, basis = rates.learning_rate, "the learning_rate given for full fine-tuning"
    elif max(parameters, 1) / NEAR_SIZE <= rates.full_rate_size <= parameters * NEAR_SIZE:
        full_rate = rates.full_rate
        basis = f"full fine-tuning of about {_size(rates.full_rate_size)} parameters would"
    else:
        return []
    ratio, rate_A = rates.loraplus_lr_ratio, rates.lora_A_rate
    factor = rates.full_to_lora
    start = first_lora_rate(full_rate, ratio * scaling, factor)  # a scaling acts as a ratio does
    felt = rate_A * math.sqrt(scaling)
    raised = ratio > 1 and felt >= PLAIN_LORA_SHARE * factor * full_rate
    raised |= ratio > FIRST_RATIO and felt >= first_lora_rate(full_rate, FIRST_RATIO, factor)
    if raised:
        return [
            f"loraplus_lr_ratio {ratio:g} raises B's rate to {ratio * rate_A:.3g}, and A's is "
            f"still {rate_A:.3g}: a larger ratio wants a smaller rate of A (LoRA+, "
            f"arXiv:2402.12354); beside {full_rate:.3g}, {basis.removesuffix(' would')}, start "
            f"from lora_learning_rate {start:.2g}"
        ]
    if felt * math.sqrt(ratio) <= full_rate:
        return [
            f"A and B learn at {rate_A:.3g} and {ratio * rate_A:.3g}, in the mean no faster than "
            f"{basis} ({full_rate:.3g}); adapters take more: two to three times that to start "
            "from (DeepSpeed-Chat), up to ten at alpha 32 (LoRA Without Regret): start from "
            f"lora_learning_rate {start:.2g}"
        ]
    return []


def _size(parameters: float) -> str:
    """Format 1.3B, 350M."""
    return f"{parameters / 1e9:g}B" if parameters >= 1e9 else f"{parameters / 1e6:g}M"
