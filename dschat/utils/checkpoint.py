"""Save model folders that transformers loads offline; never a half-written one."""

from __future__ import annotations

import copy
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.utils.distributed import Distributed, barrier
from dschat.utils.model.model_utils import unwrap
from dschat.utils.model.reward_model import RewardModel, disk_format
from dschat.utils.module.lora import merged_state_dict
from dschat.utils.zero import consolidated_state_dict

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


def save_hf_format(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    distributed: Distributed,
) -> None:
    """Write weights (adapters merged on a copy), config, tokenizer and generation config.

    Works for causal LMs and reward models, inside an engine of any ZeRO stage or outside; every
    rank must call it, rank 0 writes. The live model is not changed.
    """
    module = unwrap(model)
    state = consolidated_state_dict(module, distributed.rank)
    if distributed.is_main:
        write_model_folder(module, merged_state_dict(state, module), tokenizer, output_dir)
    barrier()


def write_model_folder(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
) -> None:
    """Write one folder under a temporary name, then put it in place with renames."""
    if isinstance(module, RewardModel):
        twin, state = disk_format(module, dict(state))
    else:
        twin = _meta_twin(module)
    missing = twin.state_dict().keys() - state.keys()
    unexpected = state.keys() - twin.state_dict().keys()
    if missing or unexpected:
        raise RuntimeError(
            f"cannot save: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        )
    output_dir = Path(output_dir).resolve()  # of a link, what it points to is replaced
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        twin.to(next(iter(state.values())).dtype).save_pretrained(temporary, state_dict=dict(state))
        tokenizer.save_pretrained(temporary)
        _put_in_place(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _meta_twin(module: PreTrainedModel) -> PreTrainedModel:
    """The plain architecture without storage: the names and format of what is saved."""
    with torch.device("meta"):
        twin = type(module)(copy.deepcopy(module.config))  # saving notes things in the config
    twin.generation_config = copy.deepcopy(module.generation_config)
    return twin


def _put_in_place(temporary: Path, output_dir: Path) -> None:
    """Swap folders; logs that already live in the output folder move over to the new one."""
    if not output_dir.exists():
        temporary.rename(output_dir)
        return
    previous = temporary.with_suffix(".old")
    output_dir.rename(previous)
    temporary.rename(output_dir)
    old_weights = {file for pattern in WEIGHT_PATTERNS for file in previous.glob(pattern)}
    for entry in previous.iterdir():
        if entry not in old_weights and not (output_dir / entry.name).exists():
            entry.rename(output_dir / entry.name)
    shutil.rmtree(previous)


def check_output_dir(output_dir: str | None) -> None:
    """Stop before work starts when results could not be written there."""
    if output_dir is None:
        return
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {output_dir}: is a file; give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir}: {error.strerror}; give a writable one"
        ) from error
    # A finished folder takes this one's place under its name, which neither of these allows.
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"output_dir {output_dir}: is the working folder; give one inside it")
    if path.is_mount():
        raise UserError(f"output_dir {output_dir}: is a mount point; give a folder inside it")
