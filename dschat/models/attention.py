"""The implementation of attention: chosen by name, checked before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Implementation:
    """Attention of one kind.

    Attributes:
        support: attribute of a model class of transformers that tells whether it takes this kind.
        probe: name of what transformers.utils has to tell whether it can run here. needs: what is
            missing where it cannot.
        dtypes: what it computes in.
    """

    support: str
    probe: str = "is_torch_available"
    needs: str = ""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")


_HALF = ("bf16", "fp16")
IMPLEMENTATIONS = {
    "eager": Implementation("config_class"),  # any model
    "sdpa": Implementation("_supports_sdpa"),
    "flash_attention_2": Implementation(
        "_supports_flash_attn", "is_flash_attn_2_available", "flash-attn 2 and a GPU", _HALF
    ),
    "flash_attention_3": Implementation(
        "_supports_flash_attn", "is_flash_attn_3_available", "flash-attn 3 and a GPU", _HALF
    ),
    "flex_attention": Implementation(
        "_supports_flex_attn", "is_torch_flex_attn_available", "a torch with flex_attention"
    ),
}


def is_flash(name: str | None) -> bool:
    """Return whether kernels are meant that take the bounds of packed sequences and no mask."""
    return name is not None and name.startswith("flash_attention")


def choose_attention(config: PretrainedConfig, name: str, label: str) -> None:
    """Set a config's implementation of attention.

    transformers would fetch a missing kernel, which is code, from the hub, or take another one.

    Args:
        label: of the model, for messages.

    Raises:
        UserError: it is not installed, or the model has no such attention.
    """
    import transformers

    kind = IMPLEMENTATIONS[name]
    if not getattr(transformers.utils, kind.probe)():
        raise UserError(
            f"attn_implementation {name}: needs {kind.needs}, which are not here; use sdpa"
        )
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    if not getattr(model_class, kind.support, False):
        others = [n for n, k in IMPLEMENTATIONS.items() if getattr(model_class, k.support, False)]
        raise UserError(
            f"attn_implementation {name}: model {label} ({config.model_type}) has none; choose "
            f"one of {', '.join(others)}"
        )
    config._attn_implementation = name


def check_attention_dtype(name: str | None, dtype: str) -> None:
    """Refuse an implementation that does not compute in this dtype (fp32, bf16, fp16).

    Raises:
        UserError: naming those that it computes in.
    """
    if name is not None and dtype not in IMPLEMENTATIONS[name].dtypes:
        takes = " or ".join(IMPLEMENTATIONS[name].dtypes)
        raise UserError(f"attn_implementation {name}: computes in {takes}, the run in {dtype}")
