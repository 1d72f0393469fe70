"""Read an adapter's tensors from PEFT's `adapter_model.safetensors` (or `.bin`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file

from dschat.errors import UserError
from dschat.utils.module.adapter_config import REWARD, WEIGHT_FILES, AdapterConfig
from dschat.utils.module.adapter_rows import Rows, take_rows

PREFIX = "base_model.model."  # of every key, before the name in the transformers model
REWARD_HEAD = "score"
MAGNITUDE_LEAF = "lora_magnitude_vector"
LEAVES = {  # a key's end: the tensor it names, and whether of an embedding
    "lora_A.weight": ("lora_A", False),
    "lora_B.weight": ("lora_B", False),
    "lora_embedding_A": ("lora_A", True),
    "lora_embedding_B": ("lora_B", True),
    MAGNITUDE_LEAF: ("magnitude", None),
}


@dataclass
class Update:
    """Trained tensors of one layer: A (r, in), B (out, r), with DoRA the row lengths (out,).

    Attributes:
        transposed: whether the weight is stored as (..., in, out), for a bare parameter, whose A
            and B may have an axis of experts in front; None for a layer, whose type tells.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float
    of_embedding: bool
    transposed: bool | None = None


@dataclass(frozen=True)
class Adapter:
    """A folder's tensors under the names of the transformers model that they belong to.

    Attributes:
        updates: by the name of the layer.
        full_tensors: complete parameters by name, those of `modules_to_save` and of embedding
            tables that are not the base's own.
        rows: of single tokens, by the name of their table.
    """

    config: AdapterConfig
    updates: dict[str, Update]
    full_tensors: dict[str, torch.Tensor]
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The adapter's name in messages."""
        return self.config.name

    @property
    def is_reward(self) -> bool:
        """True for SEQ_CLS adapters and, without a task_type, those that hold a `score` head."""
        if self.config.task is None:
            return self.head is not None
        return self.config.task == REWARD

    @property
    def head(self) -> torch.Tensor | None:
        """The (1, width) weight of a reward model's head; None where there is none."""
        return self.full_tensors.get(f"{REWARD_HEAD}.weight")


def read_adapter(config: AdapterConfig) -> Adapter:
    """Read an adapter's tensors; every key must be understood, every layer complete.

    Raises:
        UserError: naming the keys at fault.
    """
    layers: dict[str, dict[str, Any]] = {}
    full_tensors = {}
    rows, tensors, faults = take_rows(_tensors(config), config.token_indices)
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        leaf = next((end for end in LEAVES if inner.endswith(f".{end}")), None)
        if inner == key or (leaf is None and ".lora_" in inner):
            faults.append(f"unexpected {key}")
        elif leaf is None:
            full_tensors[inner.replace(".base_layer.", ".")] = tensor
        else:
            kind, of_embedding = LEAVES[leaf]
            layer = layers.setdefault(inner.removesuffix(f".{leaf}"), {"of_embedding": False})
            layer[kind] = tensor
            layer["of_embedding"] |= bool(of_embedding)
    updates = {}
    for layer_name, layer in layers.items():
        wanted = {"lora_A", "lora_B", *(["magnitude"] if config.lora.use_dora else [])}
        present = layer.keys() - {"of_embedding"}
        faults += [f"missing {layer_name}.{leaf}" for leaf in sorted(wanted - present)]
        faults += [f"unexpected {layer_name}.{leaf}" for leaf in sorted(present - wanted)]
        if wanted == present:
            layer.setdefault("magnitude", None)
            updates[layer_name] = Update(**layer, scaling=config.of_layer(layer_name).scaling)
    stop_at(faults, f"adapter {config.name}: its tensors cannot be used")
    rows = {name.removeprefix(PREFIX): row for name, row in rows.items()}
    return Adapter(config, updates, full_tensors, rows)


def _tensors(config: AdapterConfig) -> dict[str, torch.Tensor]:
    file = next(f for name in WEIGHT_FILES if (f := config.folder / name).is_file())
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise UserError(
            f"adapter {config.name}: {file.name} cannot be read ({type(error).__name__}); copy the "
            "folder again"
        ) from error


def stop_at(faults: Iterable[str], what: str) -> None:
    """Raise a UserError that lists the first faults, if there are any."""
    shown = list(faults)
    if shown:
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise UserError(f"{what} ({'; '.join(shown[:4])}{more})")
