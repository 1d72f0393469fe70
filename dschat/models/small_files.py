"""Digests of a model's files beside its weights: what decides its texts, its answers and its form.

Weights that do not train are compared by content instead, wherever they came from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.reward_statistics import VALUE_FILE
from dschat.models.save_plan import TEMPLATES
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
Digests = dict[str, str | None]  # SHA-256 of a file by its name, or that there is none


def small_file_digests(model_name_or_path: str) -> Digests:
    """Digest a model's small files, and say which a folder does not have.

    A file of an adapter has its folder's number in front, counted from the base: `1/`. Of a base on
    the hub the files are those that are cached so far; more may come.
    """
    source = resolve_model(model_name_or_path)
    base = Path(source.base).expanduser()
    digests = _in_folder(base) if base.is_dir() else _in_cache(source.base)
    for number, adapter in enumerate(source.adapters, start=1):
        digests |= {f"{number}/{name}": d for name, d in _in_folder(adapter.folder).items()}
    return digests


def _in_folder(folder: Path) -> Digests:
    digests: Digests = {n: sha256(folder / n) if (folder / n).is_file() else None for n in NAMES}
    return digests | {TEMPLATES: _of_templates(folder)}


def _of_templates(folder: Path) -> str | None:
    """Digest the names and contents of a model's further chat templates."""
    files = sorted(Path(folder, TEMPLATES).glob("*.jinja"))
    together = "".join(f"{sha256(file)} {file.name}\n" for file in files)
    return hashlib.sha256(together.encode()).hexdigest() if files else None


def _in_cache(repository: str) -> Digests:
    found = {name: try_to_load_from_cache(repository, name) for name in NAMES}
    paths = {name: path for name, path in found.items() if isinstance(path, str)}
    digests: Digests = {name: sha256(Path(path)) for name, path in paths.items()}
    more = _of_templates(Path(paths["config.json"]).parent) if "config.json" in paths else None
    return digests if more is None else digests | {TEMPLATES: more}
