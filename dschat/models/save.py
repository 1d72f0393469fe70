"""Save model folders that transformers and PEFT load offline; never a half-written one."""

from __future__ import annotations

import contextlib
import copy
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import unwrap
from dschat.models.reward_folder import RewardForm, reward_form
from dschat.models.reward_model import RewardModel
from dschat.models.reward_note import NOTE_FILE, write_note
from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.reward_statistics import VALUE_FILE, RewardStatistics, write_statistics
from dschat.models.save_plan import ADAPTER_FOLDER, MERGED, SavePlan
from dschat.models.weight_files import HEAD
from dschat.utils.distributed import Distributed, barrier
from dschat.utils.module.adapter_config import CAUSAL_LM, CONFIG_FILE, REWARD
from dschat.utils.module.adapter_write import (
    AdapterOrigin,
    AdapterOutline,
    outline_of,
    write_adapter,
)
from dschat.utils.module.lora import merged_state_dict
from dschat.utils.predecessor import changed
from dschat.utils.zero import consolidated_state_dict

# Files of the model in a folder: none of them may outlive a newer model there.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.bin"),
    *("config.json", "generation_config.json", CONFIG_FILE, "chat_template*", "merges.txt"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "vocab.txt", STATISTICS_FILE, VALUE_FILE, NOTE_FILE),
)


@changed("save_hf_format(model, tokenizer, output_dir, distributed, plan)", distributed=Distributed)
def save_hf_format(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    distributed: Distributed,
    plan: SavePlan = MERGED,
    statistics: RewardStatistics | None = None,
) -> None:
    """Write a model folder: weights (adapters merged on a copy), config, tokenizer; or an adapter.

    Works for causal LMs and reward models, inside an engine of any ZeRO stage or outside; every
    rank must call it, rank 0 writes. The live model is not changed. With a plan that has an
    adapter, its folder in PEFT's format is OUTPUT_DIR/adapter, or OUTPUT_DIR itself where no merged
    weights are asked for. A reward model's `statistics` go into each folder of weights, and what a
    critic's values were scaled by.
    """
    module = unwrap(model)
    form = None
    if isinstance(module, RewardModel):
        form = reward_form(module.config, tokenizer)
        tokenizer = form.tokenizer
    outline = None if plan.adapter is None else adapter_outline(module, plan.adapter, form)
    wanted = None if plan.merged or outline is None else outline.needed
    state = consolidated_state_dict(module, distributed.rank, wanted)
    if distributed.is_main:
        with _new_folder(output_dir) as folder:
            if plan.merged:
                _write_model(module, merged_state_dict(state, module), form, folder)
                tokenizer.save_pretrained(folder)
                _write_statistics(module, statistics, folder)
            if outline is not None:
                inside = folder / ADAPTER_FOLDER if plan.merged else folder
                _write_adapter(module, outline, state, inside)
                if form is not None:
                    write_note(form, inside, outline.config["base_model_name_or_path"])
                tokenizer.save_pretrained(inside)
                _write_statistics(module, statistics, inside)
    barrier()


def _write_statistics(module: nn.Module, statistics: RewardStatistics | None, folder: Path) -> None:
    scaling = module.value_scaling if isinstance(module, RewardModel) else None
    for name, values in {STATISTICS_FILE: statistics, VALUE_FILE: scaling}.items():
        if values is not None:
            write_statistics(values, folder, name)


def _write_model(
    module: nn.Module, state: Mapping[str, torch.Tensor], form: RewardForm | None, folder: Path
) -> None:
    if form is None:
        twin, expected = _meta_twin(_language_model(module), state), set()
    else:
        twin, state = form.twin(), form.on_disk(state)
        expected = set() if form.has_head else {HEAD}
    expected |= twin.state_dict().keys()
    if expected != state.keys():
        missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
        raise RuntimeError(f"cannot save: missing {missing}, unexpected {unexpected}")
    nn.Module.to(twin, next(iter(state.values())).dtype)
    twin.save_pretrained(folder, state_dict=dict(state))
    if form is not None:
        write_note(form, folder)


def _write_adapter(
    module: nn.Module, outline: AdapterOutline, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    folder.mkdir(exist_ok=True)
    write_adapter(outline, state, folder)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def adapter_outline(
    module: nn.Module, origin: AdapterOrigin, form: RewardForm | None
) -> AdapterOutline:
    """Map a live model's adapter to the names that its folder has."""
    if form is not None:
        return outline_of(module, origin, REWARD, form.saved_as, form.name_in_adapter)
    saved_as = type(_language_model(module))
    return outline_of(module, origin, CAUSAL_LM, saved_as, lambda name: name)


def _language_model(module: nn.Module) -> PreTrainedModel:
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"a {type(module).__name__} cannot be saved: it is no transformers model")
    return module


@contextlib.contextmanager
def _new_folder(output_dir: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which then takes `output_dir`'s place by renames."""
    output_dir = Path(output_dir).resolve()  # of a link, what it points to is replaced
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):  # safetensors writes files that their owner alone reads
            if file.is_file():
                file.chmod(temporary.stat().st_mode & 0o666)
        _put_in_place(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _meta_twin(module: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Build the plain architecture without storage: names and format of what is saved.

    Weights that are tied in the module but not in the state (merging untied them) are not tied.
    """
    config = copy.deepcopy(module.config)  # saving changes the config
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in state and state[first].data_ptr() != state[name].data_ptr():
            config.tie_word_embeddings = False
    with torch.device("meta"):
        twin = type(module)(config)
    twin.generation_config = copy.deepcopy(module.generation_config)
    return twin


def _put_in_place(temporary: Path, output_dir: Path) -> None:
    """Swap folders; logs in the output folder move over to the new one."""
    if not output_dir.exists():
        temporary.rename(output_dir)
        return
    previous = temporary.with_suffix(".old")
    output_dir.rename(previous)
    temporary.rename(output_dir)
    old_model = {file for pattern in MODEL_FILES for file in previous.glob(pattern)}
    if (previous / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        old_model.add(previous / ADAPTER_FOLDER)
    for entry in previous.iterdir():
        if entry not in old_model and not (output_dir / entry.name).exists():
            entry.rename(output_dir / entry.name)
    shutil.rmtree(previous)


def check_output_dir(output_dir: str | None) -> None:
    """Stop before work starts where results could not be written."""
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
