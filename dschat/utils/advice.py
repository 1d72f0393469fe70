"""Rules of thumb for adapters, said at the start when the settings contradict them."""

from __future__ import annotations

from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_layers import LoraConfig
from dschat.utils.optim import OptimizerConfig

RATIO_RANGE = (8.0, 32.0)  # where the LoRA+ authors found the best ratios (arXiv:2402.12354)
FIRST_RATIO = 16.0
FULL_TO_LORA_RATE = 3.0  # adapters start from two to three times full fine-tuning's rate
LARGE_DIM, CALIBRATED_ACCUMULATION = 128, 8


def lora_advice(
    lora: LoraConfig | None, rates: OptimizerConfig, engine: EngineConfig, world_size: int
) -> list[str]:
    """One line for each setting that a known rule of thumb speaks against; none stops a run."""
    if lora is None:
        return []
    ratio, rate_A = rates.loraplus_lr_ratio, rates.lora_A_rate
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
    if rates.full_rate is not None:
        start = FULL_TO_LORA_RATE * rates.full_rate
        lowered = start * FIRST_RATIO / ratio
        remedy = f"loraplus_lr_ratio {FIRST_RATIO:g}"
        if lowered > rates.full_rate:
            remedy = f"lora_learning_rate {lowered:.3g} or {remedy}"
        if rate_A <= rates.full_rate:
            lines.append(
                f"A's learning rate {rate_A:.3g} is no more than full fine-tuning would take "
                f"({rates.full_rate:.3g}), and adapters have far fewer weights to move: start from "
                f"two to three times that"
            )
        elif ratio > FIRST_RATIO and ratio * rate_A > 1.001 * FIRST_RATIO * start:
            lines.append(
                f"loraplus_lr_ratio {ratio:g} raises B's rate to {ratio * rate_A:.3g} while A's is "
                f"still {rate_A:.3g}: a larger ratio wants a smaller rate of A; try {remedy}"
            )
    if lora.dim >= LARGE_DIM and world_size == 1 and engine.gradient_accumulation_steps == 1:
        lines.append(
            f"lora_dim {lora.dim} on one device without accumulation: so many directions follow "
            "the noise of one small batch; gradient_accumulation_steps "
            f"{CALIBRATED_ACCUMULATION} is the setting that was calibrated"
        )
    if engine.dtype == "fp16":
        lines.append(
            "dtype fp16: the adapters' small gradients fall below what fp16 holds, and steps are "
            "skipped when it overflows: take bf16 where the device has it"
        )
    return [f"advice: {line}" for line in lines]
