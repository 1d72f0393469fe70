"""Resolve a model's name to its base model and the adapters to add to it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import GenerationConfig

from dschat.errors import UserError
from dschat.utils.module.adapter import Adapter, read_adapter
from dschat.utils.module.adapter_config import CONFIG_FILE, AdapterConfig, read_config

OWN_CODE = (
    "it needs code that comes with it, which is never run; give a model that transformers knows"
)
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB_FILES = ("*.json", "adapter_model.*", "*.jinja", "*.model", "*.txt")  # tokenizers included


@dataclass(frozen=True)
class ModelSource:
    """A model's parts: the base model, and adapters in the order they are added."""

    name: str
    base: str
    adapters: tuple[AdapterConfig, ...] = ()

    @property
    def label(self) -> str:
        """Its name in messages about the base model's weights."""
        return f"{self.base} (the base of {self.name})" if self.adapters else self.name

    @property
    def remedy(self) -> str:
        """Advice when the weights are not there."""
        if not self.adapters:
            return "give a model folder or a hub id"
        return _repair(self.adapters[0].name)

    def read_adapters(self) -> list[Adapter]:
        """Read the adapters' tensors, in the order they are added."""
        return [read_adapter(config) for config in self.adapters]

    def generation_config(self) -> GenerationConfig | None:
        """Load the last adapter's own; None where none has one, and the base model's is used."""
        for adapter in reversed(self.adapters):
            if (adapter.folder / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(adapter.folder)
        return None


def resolve_model(name: str) -> ModelSource:
    """Follow adapter folders down to their base model.

    Raises:
        UserError: an adapter that cannot be used, a base folder that is missing, or a circle.
    """
    adapters: list[AdapterConfig] = []
    current = name
    while (path := _adapter_path(current)) is not None:
        if any(path == adapter.folder for adapter in adapters):
            names = " → ".join([*(adapter.name for adapter in adapters), current])
            raise UserError(
                f"adapter {name}: its bases go in a circle ({names}); {_repair(current)}"
            )
        config = read_config(path, current)
        adapters.append(config)
        if is_local(config.base) and not Path(config.base).expanduser().is_dir():
            raise UserError(
                f"adapter {current}: its base {config.base} is not there; {_repair(current)}"
            )
        current = config.base
    return ModelSource(name, current, tuple(reversed(adapters)))


def same_model(one: str, other: str) -> bool:
    """Return whether two names mean one folder or hub id."""
    return place_of(one) == place_of(other)


def place_of(name: str) -> Path | str:
    """Absolute path of a folder; a hub id as it is."""
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else name


def wants_own_code(error: Exception) -> bool:
    """Return whether transformers failed because it may not run code that comes with a model."""
    return "trust_remote_code" in str(error)


def _repair(adapter: str) -> str:
    return f"put it back, or set base_model_name_or_path in {adapter}'s {CONFIG_FILE}"


def is_local(name: str) -> bool:
    """Return whether `name` means a folder: it or its parent exists, or it is spelt like a path."""
    path = Path(name)
    spelt_as_path = name.startswith((".", os.sep, "~"))
    return path.is_dir() or spelt_as_path or (os.sep in name and path.parent.is_dir())


def _adapter_path(name: str) -> Path | None:
    """Find the folder of an adapter; None for any other model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None if is_local(name) else _hub_adapter(name)
    if not (folder / CONFIG_FILE).is_file():
        return None
    if weights := [file.name for pattern in MODEL_WEIGHTS for file in folder.glob(pattern)]:
        raise UserError(
            f"model {name}: holds both {CONFIG_FILE} and {weights[0]}; move one of them away"
        )
    return folder.resolve()


@functools.cache
def _hub_adapter(name: str) -> Path | None:
    """Fetch the files of a hub repository that holds an adapter; None for any other one."""
    try:
        if not isinstance(try_to_load_from_cache(name, CONFIG_FILE), str):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return None  # a model that is cached: no need to ask the hub
            hf_hub_download(name, CONFIG_FILE)
    except (OSError, ValueError, HfHubHTTPError):  # not there, not reachable, or no hub id
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"adapter {name}: its files cannot be fetched from the hub") from error
