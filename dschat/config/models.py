"""Flags of one model: its adapters, its rates, how it is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.settings import Settings, group, setting
from dschat.train.advice import first_lora_rate
from dschat.utils.module.lora import ALL_LINEAR, LoraConfig
from dschat.utils.optim import OptimizerConfig


@dataclass(frozen=True)
class LoraArguments(Settings):
    """Flags of the adapters of one model."""

    lora_dim: int = setting(0, "rank of the adapters; 0 trains all weights")
    lora_alpha: float | None = setting(None, "scaling is alpha / dim (default: dim)")
    lora_dropout: float = setting(0.0, "dropout on the adapters' input")
    lora_init: str = setting(
        "A", "the matrix that starts random, the other is zero", choices=("A", "B")
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(dim)")
    use_dora: bool = setting(False, "DoRA: train the lengths of the weights' rows too")
    lora_module_name: tuple[str, ...] = setting(
        (ALL_LINEAR,),
        "substrings of layer names that get adapters, or all-linear; embeddings by their name",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), "names of modules that train whole, beside the adapters"
    )
    quantize_base: str | None = setting(
        None,
        "keep the wrapped weights in so many bits (needs bitsandbytes; ZeRO 0 to 2)",
        choices=("4bit", "8bit"),
    )
    lora_learning_rate: float | None = setting(
        None,
        "learning rate of A (default: the learning rate given, else what suits the ratio)",
    )
    loraplus_lr_ratio: float = setting(16.0, "LoRA+: learning rate of B over that of A")
    lora_embedding_learning_rate: float = setting(1e-6, "learning rate of adapters on embeddings")

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
class ModelArguments(Settings):
    """Flags of how one model is trained."""

    zero_stage: int = setting(0, "ZeRO stage", choices=(0, 1, 2, 3))
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")
    dropout: float | None = setting(None, "override every dropout probability")
    learning_rate: float | None = setting(
        None,
        "learning rate of all that trains (default: {full_rate:g}, of adapters another)",
    )
    weight_decay: float = setting(0.0, "weight decay, except on biases and normalisation")
    head_learning_rate: float | None = setting(
        None, "learning rate of a reward or value head (default: the learning rate)"
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
