"""Plan, before a run starts, what it saves: merged weights, an adapter, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dschat.errors import UserError
from dschat.models.config import load_config
from dschat.utils.distributed import print_rank_0
from dschat.utils.module.adapter_config import CONFIG_FILE
from dschat.utils.module.adapter_write import AdapterOrigin
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.model_source import ModelSource, place_of, resolve_model

ADAPTER_FOLDER = "adapter"  # inside a merged model's folder
ENTRIES = ("config.json", CONFIG_FILE)  # by which readers recognise a model, or an adapter
TEMPLATES = "additional_chat_templates"  # a folder of more of them, by their names
READY, LIST = ".model.new", "files.json"  # a new model that is to be put in place; its files


@dataclass(frozen=True)
class SavePlan:
    """Contents of a trained model's folder: merged weights, an adapter, or both."""

    merged: bool = True
    adapter: AdapterOrigin | None = None


MERGED = SavePlan()


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a finished model or adapter, be it not in its place yet."""
    return any((folder / name).is_file() for name in (*ENTRIES, f"{READY}/{LIST}"))


def plan_saving(
    mode: str,
    model_name_or_path: str,
    lora: LoraConfig,
    *,
    train_base: bool,
    output_dirs: Sequence[str | Path],
) -> SavePlan:
    """Decide what can be saved.

    Args:
        mode: `merged`, `adapter` or `both`.
        output_dirs: every folder that results of this model are written to.

    Raises:
        UserError: `adapter`, where an adapter could not be loaded again; or the adapter that
            training starts from lies where the output is written.
    """
    if not output_dirs:
        return MERGED
    source = resolve_model(model_name_or_path)
    folders = [Path(folder).resolve() for folder in output_dirs]
    for folder in folders:
        if any(folder / ADAPTER_FOLDER == adapter.folder for adapter in source.adapters):
            raise UserError(
                f"output_dir {folder}: its folder {ADAPTER_FOLDER!r} is what training starts from "
                "and would be replaced; give another output_dir"
            )
    if lora.lora_dim == 0 and mode == "adapter":
        print_rank_0(f"{model_name_or_path} trains without LoRA: all of it will be saved")
    if lora.lora_dim == 0 or mode == "merged":
        return MERGED
    obstacle = _no_adapter(source, train_base, folders)
    if obstacle is None:
        vocabulary = load_config(model_name_or_path).get_text_config().vocab_size
        origin = AdapterOrigin(str(place_of(source.base)), lora, vocabulary)
        return SavePlan(merged=mode == "both", adapter=origin)
    reason, remedy = obstacle
    if mode == "adapter":
        raise UserError(f"lora_save adapter: {reason}; {remedy}")
    print_rank_0(f"only the merged model will be saved, no adapter beside it: {reason}")
    return MERGED


def _no_adapter(
    source: ModelSource, train_base: bool, folders: Sequence[Path]
) -> tuple[str, str] | None:
    """Reason why an adapter alone would not restore the trained model, and the remedy."""
    if train_base:
        return "train_base_model changes the base, which an adapter does not hold", (
            "give lora_save merged, or drop train_base_model"
        )
    if source.adapters:
        return f"{source.name} is an adapter itself, and PEFT puts one adapter on a base", (
            f"merge it first: python -m dschat.merge {source.name} FOLDER"
        )
    base = Path(source.base).expanduser().resolve()
    for folder in folders:
        if base in (folder, folder / ADAPTER_FOLDER):
            return f"output_dir {folder} takes the place of its base {source.base}", (
                "give another output_dir, or lora_save merged"
            )
    return None
