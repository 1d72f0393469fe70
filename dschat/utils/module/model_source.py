"""From a model's name to what it is made of: whole weights, and the adapters to add to them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import GenerationConfig

from dschat.errors import UserError
from dschat.utils.module.adapter import (
    CONFIG_FILE,
    Adapter,
    AdapterConfig,
    read_adapter,
    read_config,
)

WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB_FILES = ("*.json", "adapter_model.*", "*.jinja", "*.model", "*.txt")  # tokenizers included


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that holds an adapter alone, or the hub's files of one in the local cache."""

    name: str
    path: Path
    config: AdapterConfig


@dataclass(frozen=True)
class ModelSource:
    """What a name stands for: `base` as it is, or with adapters, in the order they are added."""

    name: str
    base: str
    adapters: tuple[AdapterFolder, ...] = ()

    @property
    def label(self) -> str:
        """What messages about the weights call it."""
        return f"{self.base} (the base of {self.name})" if self.adapters else self.name

    @property
    def remedy(self) -> str:
        """What helps when the weights are not there."""
        if not self.adapters:
            return "give a model folder or a hub id"
        return _repair(self.adapters[0].name)

    def read_adapters(self) -> list[Adapter]:
        """The adapters' tensors, in the order they are added."""
        return [read_adapter(a.path, a.name, a.config) for a in self.adapters]

    def generation_config(self) -> GenerationConfig | None:
        """The last adapter's own; None where the base's holds."""
        for folder in reversed(self.adapters):
            if (folder.path / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(folder.path)
        return None


def resolve_model(name: str) -> ModelSource:
    """Follow adapter folders down to the base that holds whole weights.

    Raises:
        UserError: an adapter that cannot be used, a base folder that is gone, or a circle.
    """
    adapters: list[AdapterFolder] = []
    current = name
    while (path := _adapter_path(current)) is not None:
        if any(path == folder.path for folder in adapters):
            names = " → ".join([*(folder.name for folder in adapters), current])
            raise UserError(
                f"adapter {name}: its bases go in a circle ({names}); {_repair(current)}"
            )
        config = read_config(path, current)
        adapters.append(AdapterFolder(current, path, config))
        if is_local(config.base) and not Path(config.base).expanduser().is_dir():
            raise UserError(
                f"adapter {current}: its base {config.base} is not there; {_repair(current)}"
            )
        current = config.base
    return ModelSource(name, current, tuple(reversed(adapters)))


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one folder or hub id."""
    return _place(one) == _place(other)


def _place(name: str) -> Path | str:
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else name


def _repair(adapter: str) -> str:
    return f"put it back, or set base_model_name_or_path in {adapter}'s {CONFIG_FILE}"


def is_local(name: str) -> bool:
    """Whether `name` means a folder: it is one, is spelt like one, or its parent is one."""
    path = Path(name)
    spelt_as_path = name.startswith((".", os.sep, "~"))
    return path.is_dir() or spelt_as_path or (os.sep in name and path.parent.is_dir())


def _adapter_path(name: str) -> Path | None:
    """The folder of an adapter; None for any other model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None if is_local(name) else _hub_adapter(name)
    if not (folder / CONFIG_FILE).is_file():
        return None
    if whole := [file.name for pattern in WHOLE_WEIGHTS for file in folder.glob(pattern)]:
        raise UserError(
            f"model {name}: holds both {CONFIG_FILE} and {whole[0]}; move one of them away"
        )
    return folder.resolve()


@functools.cache
def _hub_adapter(name: str) -> Path | None:
    """The files of a hub repository that holds an adapter, in the local cache."""
    try:
        if not isinstance(try_to_load_from_cache(name, CONFIG_FILE), str):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return None  # a whole model that is here already: no need to ask the hub
            hf_hub_download(name, CONFIG_FILE)
    except (OSError, ValueError, HfHubHTTPError):  # not there, not reachable, or no hub id
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"adapter {name}: its files cannot be fetched from the hub") from error
