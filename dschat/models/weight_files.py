"""Files of a model's weights: whether they can be read, and the reward head in them."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from dschat.errors import UserError, brief, parse_json
from dschat.utils.module.adapter import REWARD_HEAD
from dschat.utils.module.model_source import resolve_model

DISK_HEAD, HEAD = f"{REWARD_HEAD}.weight", "v_head.weight"
FILES = (  # in the order in which transformers looks for them; an index names several
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def check_weight_files(model_name_or_path: str) -> None:
    """Refuse weights that are missing, cut or damaged, or that could run code.

    Of safetensors the header is read, of others all but the values. Files of the hub are not
    looked at: its client checks them.

    Raises:
        UserError: naming the file.
    """
    source = resolve_model(model_name_or_path)
    folder = Path(source.base).expanduser()
    if not folder.is_dir():
        return
    for file in weight_files(folder, source.label):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            elif not isinstance(torch.load(file, map_location="meta", weights_only=True), dict):
                raise ValueError("no tensors by name")
        except Exception as error:  # a broken pickle raises whatever its bytes lead to
            damage = brief(error) if isinstance(error, (SafetensorError, ValueError)) else ""
            raise UserError(
                f"model {source.label}: {file.name} cannot be read "
                f"({damage or type(error).__name__}); copy it again, or save the model as "
                "safetensors"
            ) from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """List the files that transformers would take the weights from.

    Raises:
        UserError: none, or an index names others than are there.
    """
    found = next((folder / n for n in FILES if (folder / n).is_file()), None)
    if found is None:
        raise UserError(f"model {name}: no {FILES[0]} in it; copy the complete folder")
    if found.suffix != ".json":
        return [found]
    try:
        index = parse_json(found.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model {name}: {found.name} names no files of weights; copy it again"
        ) from error
    for part in names:
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise UserError(
                f"model {name}: {found.name} names {part!r}, which is outside the folder; copy the "
                "files of the model into one folder"
            )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"model {name}: {found.name} names {len(files)} files, {len(missing)} of them are not "
            f"there ({missing[0]}); copy the complete folder"
        )
    return files


def read_bin(path: str) -> dict[str, torch.Tensor]:
    """Read `pytorch_model.bin`; {} for a folder that has none, or has better files beside it."""
    folder = _weights_folder(path)
    found = next((name for name in FILES if (folder / name).is_file()), None)
    if found != "pytorch_model.bin":
        return {}
    return torch.load(folder / found, map_location="cpu", weights_only=True)


def stored_head(path: str, bin_state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The head's weight from a folder's safetensors files, or from its `pytorch_model.bin`."""
    for file in sorted(_weights_folder(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in (DISK_HEAD, HEAD):
                if key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    return tensors.get_tensor(key)
    return bin_state.get(DISK_HEAD, bin_state.get(HEAD))


def _weights_folder(name: str) -> Path:
    """The folder itself, or the hub's files in the local cache; safetensors before others."""
    if Path(name).is_dir():
        return Path(name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"model {name}: no such folder, and no hub model that can be reached"
        ) from error
    return folder
