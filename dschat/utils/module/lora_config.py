"""Settings of the adapters of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dschat.settings import Settings, setting

ALL_LINEAR = "all-linear"
RSLORA_ALPHA = 8.0  # PEFT's: alpha = r would scale by sqrt(r), the opposite of stable


@dataclass(frozen=True)
class LoraConfig(Settings):
    """The adapters of one model: rank, scaling, start, and the layers that carry them.

    A `lora_dim` of 0 is a model without adapters, which trains all its weights.
    """

    lora_dim: int = setting(0, "rank of the adapters; 0 trains all weights", at_least=0)
    lora_alpha: float | None = setting(
        None, "scaling is alpha / dim (default: dim; with --use_rslora 8)", above=0
    )
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", at_least=0, below=1)
    lora_init: str = setting(
        "A", "the matrix that starts random, the other is zero", choices=("A", "B")
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(dim), with a fixed alpha")
    use_dora: bool = setting(False, "DoRA: train the lengths of the weights' rows too")
    lora_module_name: tuple[str, ...] = setting(
        (ALL_LINEAR,),
        "parts of the names of layers and experts that get adapters, or all-linear; embeddings by "
        "the end of their name",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), "names of modules that train in full, beside the adapters"
    )
    quantize_base: str | None = setting(
        None,
        "keep the wrapped weights in so many bits (needs bitsandbytes; ZeRO 0 to 2)",
        choices=("4bit", "8bit"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_module_name", "modules_to_save"):  # commas or spaces between names
            parts = ",".join(getattr(self, name)).split(",")
            object.__setattr__(self, name, tuple(part for part in parts if part))

    @property
    def alpha(self) -> float:
        """The alpha given, else r; with rank-stabilised LoRA one that does not grow with r."""
        if self.lora_alpha is not None:
            return self.lora_alpha
        return RSLORA_ALPHA if self.use_rslora else self.lora_dim

    @property
    def scaling(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.lora_dim) if self.use_rslora else self.lora_dim)
