"""Find weights outside plain linear layers: those of experts and of their routers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.zero import full_shape

# State-space mixers hand these layers' weights to a fused kernel, past an adapter (PEFT refuses).
FUSED_INTO_KERNELS = ("x_proj", "dt_proj", "out_proj")


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a layer only multiplies; one that does more is Llama 4's router."""
    plain = (nn.Linear.forward, Conv1D.forward)
    writes_it_out = type(module).__name__ == "FalconLinear"  # x @ W.T + b
    is_linear = isinstance(module, (nn.Linear, Conv1D))
    return is_linear and (type(module).forward in plain or writes_it_out)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds experts' weights; transformers calls it `...Experts`."""
    is_layer = isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
    return not is_layer and "expert" in type(module).__name__.lower()


def bare_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """Name the parameters of experts with an axis for them, and the weights of routers.

    A router is a module next to experts whose weight is a matrix. Linear layers that do more than
    multiply count as well.

    Args:
        modules: a model's, by full name; they may be on `meta` or in shards.
    """
    names: list[str] = []
    routers: list[str] = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and not is_plain_linear(module):
            routers.append(f"{name}.weight")
        if not is_experts(module):
            continue
        own = [f"{name}.{leaf}" for leaf, dims in _dimensions(module).items() if dims == 3]
        names += own
        parent = name.rpartition(".")[0]
        for child, other in modules[parent].named_children() if own else ():
            is_layer = isinstance(other, (nn.Linear, nn.Embedding, Conv1D))
            if not is_layer and _dimensions(other).get("weight") == 2:
                routers.append(f"{parent}.{child}.weight")
    return [*names, *dict.fromkeys(routers)]


def _dimensions(module: nn.Module) -> dict[str, int]:
    own = module.named_parameters(recurse=False)
    return {leaf: len(full_shape(p)) for leaf, p in own if not leaf.startswith("lora_")}


def is_bypassed(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether a state-space mixer reads this layer's weight without calling the layer."""
    parent, _, leaf = name.rpartition(".")
    mixer = modules[parent]
    is_state_space = re.search("mamba|mixer", type(mixer).__name__, re.IGNORECASE)
    return leaf in FUSED_INTO_KERNELS and bool(is_state_space) and hasattr(mixer, "A_log")


def check_plain(config: LoraConfig, weight: str) -> None:
    """Refuse settings that an adapter on a bare weight cannot have, here or in PEFT's format.

    Raises:
        UserError: naming the setting and the weight.
    """
    for setting in ("use_dora", "lora_dropout", "quantize_base"):
        if getattr(config, setting):
            raise UserError(
                f"{setting}: adapters on experts ({weight}) cannot follow it; leave {setting} out, "
                "or name other layers in lora_module_name"
            )
