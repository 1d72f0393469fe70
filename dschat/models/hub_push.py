"""Put the model of a finished folder on the Hub: its files alone, never what lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dschat.errors import UserError, brief
from dschat.models.placing import MODEL_FILES, PART
from dschat.models.reward_statistics import EVALUATION_FILE
from dschat.models.save_plan import READY, TEMPLATES
from dschat.utils.module.adapter_config import CONFIG_FILE, read_config

PAGES = ("README.md", "training_curve.png")  # the model card and its picture
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# What lies in folders, and the evaluation of a reward model, whose settings name local paths.
OTHERS = ["*/*", f"{Path(EVALUATION_FILE).stem}.*"]


def check_access() -> None:
    """Raise an error where this machine has no key to the Hub, or is set to stay offline.

    Raises:
        UserError: with the command that asks for a key.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: nothing goes to the Hub; unset it")
    if get_token() is None:
        raise UserError("the Hub asks who you are; run: hf auth login, or set HF_TOKEN")


def check_finished(folder: str | Path) -> Path:
    """Refuse a folder without a finished model, or one that others could not load.

    Raises:
        UserError: with what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give that of a trained model")
    is_adapter = (folder / CONFIG_FILE).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        inner = folder / "actor"
        hint = f"give {inner}" if inner.is_dir() else "give one that a run has finished"
        raise UserError(f"{folder}: holds no finished model; {hint}")
    if (folder / PART).exists() or (folder / READY).exists():
        raise UserError(f"{folder}: a model is being written there; wait for the end of its run")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise UserError(f"{folder}: holds no weights; give one that a run has finished")
    if is_adapter:
        check_base(
            read_config(folder, str(folder)).base,
            f"{folder}: its base",
            f"push the merged model: dschat merge {folder} MERGED",
        )
    return folder


def check_base(base: str, place: str, remedy: str) -> None:
    """Refuse an adapter whose base nobody else has.

    Raises:
        UserError: with the remedy.
    """
    if Path(base).expanduser().exists():
        raise UserError(f"{place} is {base}, which is on this machine alone; {remedy}")


def push(
    folder: str | Path, repository: str, public: bool = False, setting_name: str = "public"
) -> str:
    """Upload a finished model's files in one commit; the repository is made where there is none.

    Args:
        setting_name: the flag that `public` comes from.

    Returns:
        Its address.

    Raises:
        UserError: the folder is not finished, the repository is public and should not be, or the
            Hub refuses.
    """
    folder = check_finished(folder)
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        is_public = not api.repo_info(repository).private
        if is_public == public:
            files = [*MODEL_FILES, f"{TEMPLATES}/*.jinja", *PAGES]
            message = "Model trained with dschat"
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=files,
                ignore_patterns=OTHERS,
                commit_message=message,
            )
    except Exception as error:  # of the network, or the Hub's answer
        raise UserError(f"{repository}: {brief(error, with_type=True)}") from error
    if is_public != public:
        now, remedy = ("public", "add") if is_public else ("private", "drop")
        raise UserError(
            f"{repository}: is {now} on the Hub; {remedy} --{setting_name}, or change it there"
        )
    return str(url)
