"""Write PEFT's adapter files from a live model: names, `adapter_config.json`, tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from dschat.utils.module.adapter import MAGNITUDE_LEAF, PREFIX
from dschat.utils.module.adapter_config import CONFIG_FILE, REWARD, WEIGHT_FILE
from dschat.utils.module.adapter_parameters import TAKEN_FOR_EXPERTS, file_layout, wrapper_names
from dschat.utils.module.adapter_rows import ROWS_ADAPTER, ROWS_LEAF
from dschat.utils.module.experts import is_experts
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.lora_layers import LoRALayer, LoRALinear, LoRAWeight
from dschat.utils.module.lora_parameters import LoRAParameters
from dschat.utils.module.targets import fully_trained_modules
from dschat.utils.module.token_rows import ROWS_NAME, TokenRows, tables_with_rows, trained_rows
from dschat.utils.zero import full_shape

VALUE_HEAD = "v_head"
PEFT_NAMES = {  # a layer's own names of its trained tensors: PEFT's, where they differ
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    LoRAWeight.MAGNITUDE_NAME: MAGNITUDE_LEAF,
}


@dataclass(frozen=True)
class AdapterOrigin:
    """Base model and settings of an adapter: what its folder says beside its tensors.

    Attributes:
        base: a hub id or an absolute path. vocabulary: rows of the base's own embedding; tables
            with more rows go into the folder.
    """

    base: str
    lora: LoraConfig
    vocabulary: int


@dataclass(frozen=True)
class AdapterOutline:
    """Content of an adapter's folder: names in the live model → keys there, and the config.

    Attributes:
        token_rows: names of tables of which rows trained → key of these rows, and their (k,) ids.
    """

    tensors: dict[str, str]
    config: dict[str, Any]
    token_rows: dict[str, tuple[str, torch.Tensor]]

    @property
    def needed(self) -> set[str]:
        """Names in the live model's state that are read."""
        leaves = ("weight", ROWS_NAME)
        return {*self.tensors, *(f"{name}.{leaf}" for name in self.token_rows for leaf in leaves)}


def outline_of(
    module: nn.Module,
    origin: AdapterOrigin,
    task: str,
    saved_as: type[PreTrainedModel],
    disk_name: Callable[[str], str | None],
) -> AdapterOutline:
    """Plan the files; looks at names, types and shapes only.

    Args:
        task: CAUSAL_LM or SEQ_CLS. saved_as: the class that the adapter's base loads as.
        disk_name: maps a module's name in the live model to its name in that class; None: not
            saved.
    """
    layers = lora_layers(module)
    trained, tied = _fully_trained(module, origin.lora.modules_to_save, task)
    trained = [name for name in trained if disk_name(name) is not None]
    rows = {
        name: (f"{disk_name(name)}.{ROWS_LEAF}", tokens)
        for name, tokens in tables_with_rows(module).items()
    }
    indices = {disk_name(name): tokens.tolist() for name, (_, tokens) in rows.items()}
    bare, linear = _targets(module, origin.lora, layers)
    targets = [str(disk_name(name)) for name in linear]
    others = [disk_name(name) for name, _ in module.named_modules() if name and name not in layers]
    config = {
        **_fixed_fields(origin, task, saved_as),
        "ensure_weight_tying": tied,
        "fan_in_fan_out": any(
            isinstance(layer, LoRALinear) and layer.transposed for layer in layers.values()
        ),
        "modules_to_save": [disk_name(name) for name in trained] or None,
        "target_modules": _exactly(targets, [name for name in others if name]),
        **({"target_parameters": sorted(f"{disk_name(m)}.{p}" for m, p in bare)} if bare else {}),
        "trainable_token_indices": indices or None,
    }
    grown = _grown_tables(module, origin.vocabulary)
    return AdapterOutline(_keys(module, layers, trained, grown, disk_name), config, rows)


def _fixed_fields(
    origin: AdapterOrigin, task: str, saved_as: type[PreTrainedModel]
) -> dict[str, Any]:
    """PEFT's fields that follow from the settings, whichever layers the model has."""
    alpha = float(origin.lora.alpha)
    return {
        "auto_mapping": {
            "base_model_class": saved_as.__name__,
            "parent_library": saved_as.__module__,
            # PEFT has no name for a random B. It keeps this mapping as it is, without a warning,
            # and uses it only where no task_type is given.
            "lora_init": origin.lora.lora_init,
        },
        "base_model_name_or_path": origin.base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": origin.lora.lora_dropout,
        "peft_type": "LORA",
        "r": origin.lora.lora_dim,
        "task_type": task,
        "use_dora": origin.lora.use_dora,
        "use_rslora": origin.lora.use_rslora,
    }


def _keys(
    module: nn.Module,
    layers: Mapping[str, LoRALayer],
    trained: list[str],
    grown: list[str],
    disk_name: Callable[[str], str | None],
) -> dict[str, str]:
    """Map the tensors of adapters, of fully trained modules and of grown tables to PEFT's keys."""
    keys = {}
    for name, layer in layers.items():
        if isinstance(layer, LoRAParameters):
            wrappers = wrapper_names(f"{disk_name(name)}", len(layer.adapted))
            for leaf, wrapper in zip(layer.adapted, wrappers, strict=True):
                for matrix in ("lora_A", "lora_B"):
                    keys[f"{name}.{matrix}_{leaf}"] = f"{wrapper}.{matrix}.weight"
        else:
            for leaf in layer.adapter:
                keys[f"{name}.{leaf}"] = f"{disk_name(name)}.{PEFT_NAMES.get(leaf, leaf)}"
    for name in trained:
        for leaf in module.get_submodule(name).state_dict():
            keys[f"{name}.{leaf}"] = f"{disk_name(name)}.{leaf}"
    for name in grown:
        table = module.get_submodule(name)
        inside = ".base_layer" if name in layers else ""
        inside = f".{ROWS_ADAPTER}.base_layer" if isinstance(table, TokenRows) else inside
        for leaf, _ in table.named_parameters(recurse=False):
            if not leaf.startswith("lora_"):
                keys.setdefault(f"{name}.{leaf}", f"{disk_name(name)}{inside}.{leaf}")
    return keys


def write_adapter(outline: AdapterOutline, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write config and tensors into an existing folder.

    Args:
        state: the live model's tensors by their names there; more than is needed does no harm.
    """
    tensors = {
        PREFIX + key: file_layout(name.rpartition(".")[2], state[name]).contiguous()
        for name, key in outline.tensors.items()
    }
    for name, (key, tokens) in outline.token_rows.items():
        weight, rows = state[f"{name}.weight"], state[f"{name}.{ROWS_NAME}"]
        tensors[PREFIX + key] = trained_rows(weight, tokens.cpu(), rows)
    # Two names of one tensor are not allowed in the file.
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(tensors, folder / WEIGHT_FILE, metadata={"format": "pt"})
    text = json.dumps(outline.config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _targets(
    module: nn.Module, lora: LoraConfig, layers: Mapping[str, LoRALayer]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Part what carries an adapter into bare parameters, (module, leaf), and layers for PEFT."""
    has_experts = any(is_experts(m) for m in module.modules())
    as_parameters = has_experts and not lora.use_dora and not lora.lora_dropout
    bare, linear = [], []
    for name, layer in layers.items():
        is_taken = as_parameters and name.split(".")[-1] in TAKEN_FOR_EXPERTS
        if isinstance(layer, LoRAParameters) or (is_taken and isinstance(layer, LoRALinear)):
            bare += [(name, leaf) for leaf in layer.adapted]
        else:
            linear.append(name)
    return bare, linear


def _fully_trained(
    module: nn.Module, modules_to_save: tuple[str, ...], task: str
) -> tuple[list[str], bool]:
    """List modules that trained fully, the reward head included; tell whether any of them is tied.

    A module that shares a parameter with one of them trained with it, and is one of them.
    """
    head = [VALUE_HEAD] if task == REWARD else []
    named = list(dict.fromkeys([*fully_trained_modules(module, modules_to_save), *head]))
    outer = [n for n in named if not any(n.startswith(f"{other}.") for other in named)]
    trained = {id(p) for name in outer for p in module.get_submodule(name).parameters()}
    partners = [
        name
        for name, other in module.named_modules()
        if any(id(p) in trained for p in other.parameters(recurse=False))
        and not any(name == n or name.startswith(f"{n}.") for n in outer)
    ]
    everyone = [*outer, *partners]
    separate = sum(len({*module.get_submodule(n).parameters()}) for n in everyone)
    return everyone, separate > len(trained)


def _grown_tables(module: nn.Module, vocabulary: int) -> list[str]:
    """Name embedding and untied output head, where the tokenizer outgrew the base's vocabulary."""
    model = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if full_shape(cast(torch.Tensor, embedding.weight))[0] <= vocabulary:
        return []
    tables = {id(embedding)}
    if head is not None and head.weight is not embedding.weight:
        tables.add(id(head))
    return [name for name, m in module.named_modules() if id(m) in tables]


def _exactly(targets: list[str], others: list[str]) -> list[str] | str:
    """Return the names, or one pattern where PEFT, which takes ends of names too, finds more."""
    ends = tuple(f".{name}" for name in targets)
    if not any(name.endswith(ends) for name in others):
        return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(targets))
