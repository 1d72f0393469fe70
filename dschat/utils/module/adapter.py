"""Read PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

The tensors' names say which layers carry an adapter, not `target_modules`, which may be a pattern.
Options that change the result and are not understood here are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dschat.errors import UserError
from dschat.utils.module.lora_layers import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHT_FILE, "adapter_model.bin")
PREFIX = "base_model.model."  # of every key, before the name in the transformers model
CAUSAL_LM, REWARD = "CAUSAL_LM", "SEQ_CLS"
REWARD_HEAD = "score"
MAGNITUDE_LEAF = "lora_magnitude_vector"
LEAVES = {  # a key's end: the tensor it names, and whether of an embedding
    "lora_A.weight": ("lora_A", False),
    "lora_B.weight": ("lora_B", False),
    "lora_embedding_A": ("lora_A", True),
    "lora_embedding_B": ("lora_B", True),
    MAGNITUDE_LEAF: ("magnitude", None),
}

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
UNDERSTOOD = {
    *("peft_type", "task_type", "base_model_name_or_path", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    "modules_to_save",
}
WITHOUT_EFFECT = {  # on what a trained adapter computes
    *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
REFUSED = {
    "bias": "it trained biases of the base",
    "lora_bias": "B has a bias",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trained single rows of the embedding",
    "target_parameters": "it adapts bare parameters, not layers",
    "alora_invocation_tokens": "it is on after certain tokens only",
    "use_qalora": "it pools the input of A",
    "use_bdlora": "its matrices are block-diagonal",
    "megatron_config": "it is for layers split among devices",
    "revision": "of the base only the default revision is read",
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's folder (or the hub's files of one, cached), and what its config says.

    Attributes:
        name: what messages call it. base: what it sits on, a folder or hub id.
        task: CAUSAL_LM, SEQ_CLS, or None where PEFT was given none.
        rank_pattern, alpha_pattern: ranks and alphas of layers that differ from `lora`'s.
    """

    name: str
    folder: Path
    base: str
    task: str | None
    lora: LoraConfig
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.lora.lora_dim, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"r is {rank}")

    def of_layer(self, layer: str) -> LoraConfig:
        """Return the settings of the layer of this name: its own rank and alpha."""
        rank = _by_pattern(self.rank_pattern, layer, self.lora.lora_dim)
        alpha = _by_pattern(self.alpha_pattern, layer, self.lora.lora_alpha)
        return replace(self.lora, lora_dim=rank, lora_alpha=alpha)

    def trains_fully(self, name: str) -> bool:
        """Tell whether a module or parameter is, or is in, one of `modules_to_save`."""
        parts, trained = name.split("."), self.lora.modules_to_save
        ancestors = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(a == m or a.endswith(f".{m}") for a in ancestors for m in trained)


def _by_pattern(patterns: dict[str, Any], layer: str, default: Any) -> Any:
    """Follow PEFT's rule: the first key that, as a pattern, matches the name or its end."""
    matching = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, default)


@dataclass
class Update:
    """Trained tensors of one layer: A (r, in), B (out, r), with DoRA the row lengths (out,)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float
    of_embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A folder's tensors under the names of the transformers model that they belong to.

    Attributes:
        updates: by the name of the layer.
        full_tensors: complete parameters by name, those of `modules_to_save` and of embedding
            tables that are not the base's own.
    """

    config: AdapterConfig
    updates: dict[str, Update]
    full_tensors: dict[str, torch.Tensor]

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


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`; `name` is its name in messages.

    Raises:
        UserError: unreadable, not LoRA, no base named, or an option that is not supported.
    """
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind, base = raw.get("peft_type"), raw.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not a JSON object"
        raise UserError(
            f"adapter {name}: {CONFIG_FILE} cannot be read ({reason}); save the adapter again"
        ) from error
    if kind != "LORA":
        raise UserError(
            f"adapter {name}: peft_type is {kind!r}, only LORA can be read; merge it with PEFT and "
            "give the merged folder"
        )
    if not base:
        raise UserError(
            f"adapter {name}: names no base; set base_model_name_or_path in its {CONFIG_FILE}"
        )
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise UserError(f"adapter {name}: holds no {WEIGHT_FILE}; copy the complete folder")
    _refuse(raw, name)
    try:
        lora = LoraConfig(
            lora_dim=int(raw.get("r", 8)),
            lora_alpha=float(raw.get("lora_alpha", 8)),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
        )
        return AdapterConfig(
            name=name,
            folder=folder,
            base=base,
            task=raw.get("task_type"),
            lora=lora,
            rank_pattern=dict(raw.get("rank_pattern") or {}),
            alpha_pattern=dict(raw.get("alpha_pattern") or {}),
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"adapter {name}: {CONFIG_FILE} is malformed ({error}); save the adapter again"
        ) from error


def _refuse(raw: dict[str, Any], name: str) -> None:
    """Stop at options by which a layer computes something else than W + s B A."""
    remedy = "merge it with PEFT and give the merged folder"
    start = raw.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise UserError(
            f"adapter {name}: init_lora_weights {start!r} changes the base's weights, and the "
            f"folder does not hold the changed ones; {remedy}"
        )
    if raw.get("task_type") not in (None, CAUSAL_LM, REWARD):
        raise UserError(
            f"adapter {name}: task_type is {raw['task_type']!r}; give one of {CAUSAL_LM} or of "
            f"{REWARD} with one label"
        )
    for key, value in raw.items():
        if key not in UNDERSTOOD | WITHOUT_EFFECT and value and value != "none":
            reason = REFUSED.get(key, "this option is not supported here")
            raise UserError(f"adapter {name}: {key} is {value!r}: {reason}; {remedy}")


def read_adapter(config: AdapterConfig) -> Adapter:
    """Read an adapter's tensors; every key must be understood, every layer complete.

    Raises:
        UserError: naming the keys at fault.
    """
    layers: dict[str, dict[str, Any]] = {}
    full_tensors, faults = {}, []
    for key, tensor in _tensors(config).items():
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
            lora, stored = config.of_layer(layer_name), layer["lora_A"].shape[0]
            if lora.lora_dim != stored:
                faults.append(f"{layer_name} of rank {stored}, {CONFIG_FILE} says {lora.lora_dim}")
            layer.setdefault("magnitude", None)
            updates[layer_name] = Update(**layer, scaling=lora.scaling)
    stop_at(faults, f"adapter {config.name}: its tensors cannot be used")
    return Adapter(config, updates, full_tensors)


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
