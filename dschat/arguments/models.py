"""Flags of one model: its adapters, its rates, how it is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.cli import SWITCH, flag, group
from dschat.utils.advice import first_lora_rate
from dschat.utils.module.lora import ALL_LINEAR, LoraConfig
from dschat.utils.optim import OptimizerConfig


@dataclass(frozen=True)
class LoraArguments:
    """Flags of the adapters of one model."""

    lora_dim: int = flag(0, "rank of the adapters; 0 trains all weights")
    lora_alpha: float | None = flag(None, "scaling is alpha / dim (default: dim)", type=float)
    lora_dropout: float = flag(0.0, "dropout on the adapters' input")
    lora_init: str = flag(
        "A", "the matrix that starts random, the other is zero", choices=["A", "B"]
    )
    use_rslora: bool = flag(False, "scale by alpha / sqrt(dim)", **SWITCH)
    use_dora: bool = flag(False, "DoRA: train the lengths of the weights' rows too", **SWITCH)
    lora_module_name: list[str] = flag(
        [ALL_LINEAR],
        "substrings of layer names that get adapters, or all-linear; embeddings by their name",
        nargs="+",
        type=str,
    )
    modules_to_save: list[str] = flag(
        [], "names of modules that train whole, beside the adapters", nargs="+", type=str
    )
    quantize_base: str | None = flag(
        None,
        "keep the wrapped weights in so many bits (needs bitsandbytes; ZeRO 0 to 2)",
        type=str,
        choices=["4bit", "8bit"],
    )
    lora_learning_rate: float | None = flag(
        None,
        "learning rate of A (default: the learning rate given, else what suits the ratio)",
        type=float,
    )
    loraplus_lr_ratio: float = flag(16.0, "LoRA+: learning rate of B over that of A")
    lora_embedding_learning_rate: float = flag(1e-6, "learning rate of adapters on embeddings")

    def config(self) -> LoraConfig | None:
        """The adapters asked for, or None."""
        if self.lora_dim == 0:
            return None
        return LoraConfig(
            dim=self.lora_dim,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            init=self.lora_init,
            use_rslora=self.use_rslora,
            module_names=_parts(self.lora_module_name),
            use_dora=self.use_dora,
            modules_to_save=_parts(self.modules_to_save),
            quantize=self.quantize_base,
        )


def _parts(names: list[str]) -> tuple[str, ...]:
    """Given apart or with commas between them."""
    return tuple(part for name in names for part in name.split(",") if part)


@dataclass(frozen=True)
class ModelArguments:
    """Flags of how one model is trained."""

    zero_stage: int = flag(0, "ZeRO stage", choices=[0, 1, 2, 3])
    gradient_checkpointing: bool = flag(False, "recompute activations in backward", **SWITCH)
    dropout: float | None = flag(None, "override every dropout probability", type=float)
    learning_rate: float | None = flag(
        None,
        "learning rate of all that trains (default: {full_rate:g}, of adapters another)",
        type=float,
    )
    weight_decay: float = flag(0.0, "weight decay, except on biases and normalisation")
    head_learning_rate: float | None = flag(
        None, "learning rate of a reward or value head (default: the learning rate)", type=float
    )
    full_rate: float = 1e-5  # no flag: each step sets its own
    lora: LoraArguments = group(LoraArguments)

    def optimizer_config(self) -> OptimizerConfig:
        """Rates of every group; where none is given, those that suit the step and the ratio."""
        given, lora_given = self.learning_rate, self.lora.lora_learning_rate
        first = first_lora_rate(self.full_rate, self.lora.loraplus_lr_ratio)
        rates_A = [rate for rate in (lora_given, given, first) if rate is not None]
        # Beside a rate of the adapters' own, the other one is that of what trains whole.
        full_is_given = given is not None and lora_given is not None
        return OptimizerConfig(
            learning_rate=self.full_rate if given is None else given,
            weight_decay=self.weight_decay,
            lora_learning_rate=rates_A[0],
            loraplus_lr_ratio=self.lora.loraplus_lr_ratio,
            lora_embedding_learning_rate=self.lora.lora_embedding_learning_rate,
            head_learning_rate=self.head_learning_rate,
            full_rate=given if full_is_given else self.full_rate,
        )
