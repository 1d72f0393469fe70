"""Plan of a model's folder, on `meta`: what weights are made of, and the files that hold them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from dschat.models.reward_folder import RewardForm
from dschat.models.weight_files import FILES, HEAD
from dschat.utils.module.lora import merge_groups, merged_state_dict
from dschat.utils.zero import full_shape, memory_of

SHARD_BYTES = 4 * 10**9


State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Unit:
    """Weights of the live model that make weights of the folder together.

    Attributes:
        names: in the live model. modules: those of its adapters that merge here. made: names in
            the folder.
    """

    names: tuple[str, ...]
    modules: frozenset[str]
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderPlan:
    """A model's folder before it is written.

    Attributes:
        twin: the plain architecture without storage, as it will be loaded.
        kept: names that are saved, before transformers gives them those of the hub's files.
        files: names of the tensors in each. index: the content of the file that lists them.
    """

    module: nn.Module
    form: RewardForm | None
    twin: PreTrainedModel
    kept: frozenset[str]
    converts: bool
    units: tuple[Unit, ...]
    files: dict[str, list[str]]
    index: dict[str, Any] | None

    def write_config(self, folder: Path) -> None:
        """Write the files that need no weights."""
        config = self.twin.config
        config.dtype = str(self.twin.dtype).removeprefix("torch.")
        config.architectures = [type(self.twin).__name__]
        config.save_pretrained(folder)
        if self.twin.can_generate():
            self.twin.generation_config.save_pretrained(folder)
        if self.index is not None:
            text = json.dumps(self.index, indent=2, sort_keys=True) + "\n"
            (folder / FILES[1]).write_text(text, encoding="utf-8")

    def convert(self, unit: Unit, state: State) -> dict[str, torch.Tensor]:
        """Make a unit's tensors as they stand in the folder."""
        made = merged_state_dict(state, self.module, unit.modules)
        if self.form is not None:
            made = self.form.on_disk(made)
        made = {name: tensor for name, tensor in made.items() if name in self.kept}
        if self.converts and made:
            made = revert_weight_conversion(self.twin, made)
        return made


def plan_folder(
    module: nn.Module, form: RewardForm | None, shard_bytes: int = SHARD_BYTES
) -> FolderPlan:
    """Plan a model's folder from names and shapes; every rank comes to the same plan."""
    state = _on_meta(module)
    merged = merged_state_dict(state, module)
    if form is None:
        assert isinstance(module, PreTrainedModel)
        twin, expected = _meta_twin(module, merged), set()
    else:
        twin, merged = form.twin(), form.on_disk(merged)
        expected = set() if form.has_head else {HEAD}
    expected |= twin.state_dict().keys()
    if expected != merged.keys():
        missing, unexpected = sorted(expected - merged.keys()), sorted(merged.keys() - expected)
        raise RuntimeError(f"cannot save: missing {missing}, unexpected {unexpected}")
    nn.Module.to(twin, next(iter(merged.values())).dtype)
    kept = _kept(merged, twin)
    final = revert_weight_conversion(twin, kept)
    converts = final is not kept
    # Parts of one tensor, such as experts, would each count as all of it.
    apart = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in final.items()}
    split = split_torch_state_dict_into_shards(
        apart, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    index: dict[str, Any] | None = None
    if split.is_sharded:
        metadata = {"total_parameters": twin.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    files = dict(split.filename_to_tensors)
    plan = FolderPlan(module, form, twin, frozenset(kept), converts, (), files, index)
    for units in (_units(module, state, converts), [_everything(module, state)]):
        made = [plan.convert(unit, {n: state[n] for n in unit.names}) for unit in units]
        if _same(made, final):
            break
    else:
        raise RuntimeError("cannot save: the parts of the model do not make the whole")
    order = {name: number for number, name in enumerate(final)}
    units = [
        Unit(unit.names, unit.modules, tuple(tensors))
        for unit, tensors in zip(units, made, strict=True)
        if tensors
    ]
    units.sort(key=lambda unit: min(order[name] for name in unit.made))
    return FolderPlan(module, form, twin, plan.kept, converts, tuple(units), files, index)


def _on_meta(module: nn.Module) -> dict[str, torch.Tensor]:
    """Describe the state: shapes and dtypes, and what is tied to what."""
    state: dict[str, torch.Tensor] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in live_tensors(module).items():
        if id(tensor) not in tensors:
            shape = full_shape(tensor)
            tensors[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        state[name] = tensors[id(tensor)]
    return state


def live_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Map names to parameters, tied ones under each name, and to persistent buffers."""
    persistent = module.state_dict().keys()
    live: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return live | {name: b for name, b in module.named_buffers() if name in persistent}


def _meta_twin(module: PreTrainedModel, merged: State) -> PreTrainedModel:
    """Build the plain architecture without storage: names and format of what is saved.

    Weights that are tied in the module but not in what is saved (merging untied them) are not tied.
    """
    config = copy.deepcopy(module.config)  # saving changes the config
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in merged and memory_of(merged[first]) != memory_of(merged[name]):
            config.tie_word_embeddings = False
    with torch.device("meta"):
        twin = type(module)(config)
    twin.generation_config = copy.deepcopy(module.generation_config)
    return twin


def _kept(merged: State, twin: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Leave out what transformers does not save, and of tied tensors all but one."""
    ignored = set(twin._keys_to_ignore_on_save or ())
    # On meta transformers cannot tell what is tied: a number stands for each tensor.
    numbers = {memory_of(tensor): torch.zeros(1) for tensor in merged.values()}
    stand_ins = {n: numbers[memory_of(t)] for n, t in merged.items() if n not in ignored}
    names = remove_tied_weights_from_state_dict(stand_ins, twin).keys()
    return {name: merged[name] for name in merged if name in names}


def _units(module: nn.Module, state: State, by_module: bool) -> list[Unit]:
    """Part the state into the smallest units.

    Args:
        by_module: tensors of one module belong together as well.
    """
    groups = list(merge_groups(module).items())
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    sets: list[Iterable[str]] = [*tied.values(), *(names for _, names in groups)]
    if by_module:
        parents: dict[str, list[str]] = {}
        for name in state:
            parents.setdefault(name.rpartition(".")[0], []).append(name)
        sets += parents.values()
    root = {name: name for name in state}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = name = root[root[name]]
        return name

    for names in sets:
        first, *others = [name for name in names if name in root]
        for other in others:
            root[find(other)] = find(first)
    members: dict[str, list[str]] = {}
    for name in state:
        members.setdefault(find(name), []).append(name)
    modules: dict[str, set[str]] = {}
    for module_name, names in groups:
        modules.setdefault(find(names[0]), set()).add(module_name)
    return [Unit(tuple(names), frozenset(modules.get(key, ()))) for key, names in members.items()]


def _everything(module: nn.Module, state: State) -> Unit:
    return Unit(tuple(state), frozenset(merge_groups(module)))


def _same(made: list[dict[str, torch.Tensor]], final: State) -> bool:
    """Return whether the parts make the whole: each tensor once, of its shape and dtype."""
    parts = {name: (t.shape, t.dtype) for part in made for name, t in part.items()}
    whole = {name: (t.shape, t.dtype) for name, t in final.items()}
    return parts == whole and sum(map(len, made)) == len(whole)
