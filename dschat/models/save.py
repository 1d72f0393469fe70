"""Save model folders that transformers and PEFT load offline; never a half-written one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import unwrap
from dschat.models.placing import new_model
from dschat.models.reward_folder import RewardForm, reward_form
from dschat.models.reward_model import RewardModel
from dschat.models.reward_note import write_note
from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.reward_statistics import VALUE_FILE, RewardStatistics, write_statistics
from dschat.models.save_plan import ADAPTER_FOLDER, MERGED, SavePlan
from dschat.models.weight_files import HEAD
from dschat.utils.distributed import Distributed
from dschat.utils.files import disk_errors_named
from dschat.utils.module.adapter_config import CAUSAL_LM, REWARD
from dschat.utils.module.adapter_write import (
    AdapterOrigin,
    AdapterOutline,
    outline_of,
    write_adapter,
)
from dschat.utils.module.lora import merged_state_dict
from dschat.utils.predecessor import changed
from dschat.utils.waiting import from_waiting_main
from dschat.utils.zero import consolidated_state_dict

_AFTER = "no model was written, what was there is as it was; mend that, and start again, or resume"


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

    Raises:
        UserError: on every rank, where the disk does not take it; what was there stays.
    """
    module = unwrap(model)
    form = None
    if isinstance(module, RewardModel):
        form = reward_form(module.config, tokenizer)
        tokenizer = form.tokenizer
    outline = None if plan.adapter is None else adapter_outline(module, plan.adapter, form)
    wanted = None if plan.merged or outline is None else outline.needed
    state = consolidated_state_dict(module, distributed.rank, wanted)

    def write() -> str:
        if distributed.is_main:
            place = f"output_dir {output_dir}"
            with disk_errors_named(place, lambda: _AFTER), new_model(output_dir) as folder:
                fill(folder)
        return ""

    def fill(folder: Path) -> None:
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

    from_waiting_main(write)


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
