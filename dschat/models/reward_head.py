"""The head of a reward model's folder, read before any model is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dschat.errors import UserError
from dschat.models.config import load_config
from dschat.models.weight_files import (
    DISK_HEAD,
    HEAD,
    check_weight_files,
    read_bin,
    stored_head,
)
from dschat.utils.module.adapter import Adapter
from dschat.utils.module.model_source import resolve_model


def read_head(model_name_or_path: str) -> torch.Tensor | None:
    """Read the head's weight in a folder or under a hub id; None where there is none.

    Raises:
        UserError: files of weights that cannot be read.
    """
    check_weight_files(model_name_or_path)
    source = resolve_model(model_name_or_path)
    head = last_head(source.read_adapters(), None)
    return stored_head(source.base, read_bin(source.base)) if head is None else head


def check_language_model(model_name_or_path: str, remedy: str = "give a language model") -> None:
    """Refuse a reward model in the place of a language model, before any model is built.

    Raises:
        UserError: naming the folder or the adapter.
    """
    load_config(model_name_or_path)  # first: it says best what is missing in a folder of no model
    source = resolve_model(model_name_or_path)
    for adapter in source.read_adapters():
        if adapter.is_reward:
            raise UserError(f"adapter {adapter.name}: is a reward model's, {remedy}")
    if not source.adapters and read_head(model_name_or_path) is not None:
        raise UserError(
            f"model {model_name_or_path}: is a reward model (it holds a head), {remedy}"
        )


def check_reward_head(model_name_or_path: str) -> None:
    """Raise an error when a checkpoint holds no head, before any model is built.

    Raises:
        UserError: what `create_critic_model` raises without `init_head`.
    """
    if read_head(model_name_or_path) is None:
        raise UserError(no_head(model_name_or_path))


def last_head(adapters: Sequence[Adapter], base_head: torch.Tensor | None) -> torch.Tensor | None:
    """The head of the last adapter that has one, else the base's."""
    return next((a.head for a in reversed(adapters) if a.head is not None), base_head)


def no_head(name: str) -> str:
    """Make the error of a reward model without a head, with the remedy."""
    return f"reward model {name}: no {DISK_HEAD} or {HEAD} in it; train one with step 2 first"
