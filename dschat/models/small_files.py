"""Digests of a model's files beside its weights: what decides its texts, its answers and its form.

Weights that do not train are compared by content instead, wherever they came from.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.reward_statistics import VALUE_FILE
from dschat.utils.files import sha256
from dschat.utils.module.adapter_config import CONFIG_FILE
from dschat.utils.module.model_source import resolve_model

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    CONFIG_FILE,
    STATISTICS_FILE,
    VALUE_FILE,
)


def small_file_digests(model_name_or_path: str) -> dict[str, str]:
    """Map each of a model's small files to its SHA-256; those of a hub model as they are cached.

    A file of an adapter has its folder's number in front, counted from the base: `1/`.
    """
    source = resolve_model(model_name_or_path)
    folders = [_folder_of(source.base), *(adapter.folder for adapter in source.adapters)]
    return {
        f"{number}/{name}" if number else name: sha256(folder / name)
        for number, folder in enumerate(folders)
        for name in NAMES
        if folder is not None and (folder / name).is_file()
    }


def _folder_of(base: str) -> Path | None:
    """Folder of a base model, of the hub's the one in its cache."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    cached = try_to_load_from_cache(base, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None
