"""Add an adapter read from disk to the weights of its loaded base model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.utils.module.adapter import Adapter, Update, stop_at
from dschat.utils.module.adapter_parameters import placed_updates
from dschat.utils.module.adapter_rows import Rows
from dschat.utils.module.low_rank import merged_weight
from dschat.utils.module.targets import HEAD_NAMES
from dschat.utils.zero import full_shape, gathered


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter, trunk: str = "") -> None:
    """Merge an adapter into a model in place, in fp32 and cast once; also under ZeRO-3.

    Larger embedding tables resize the model. A weight that two layers share is untied where the
    adapter changes the two differently.

    Args:
        trunk: where `model` is the trunk alone, its name in the adapter's model (`model`); tensors
            of the output head are then left out.

    Raises:
        UserError: a tensor that fits nowhere, or one that is missing.
    """
    updates, full_tensors, rows = _by_name_in(adapter, trunk)
    updates = placed_updates(model, adapter.config, updates, trunk)
    _grow(model, full_tensors)
    _check(model, adapter, trunk, updates, full_tensors, rows)
    trained = {n for n in full_tensors if adapter.config.trains_fully(_full_name(n, trunk))}
    for name, tensor in full_tensors.items():
        if name not in trained:  # the table that the adapter was trained on; tied layers share it
            _copy(model, name, tensor)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for names in users.values():
        layers = {n: updates[key] for n in names for key in (n, _layer(n)) if key in updates}
        tokens = _rows_of(model, names, rows) if rows else {}
        if layers or tokens or trained & {*names}:
            whole = {n: full_tensors[n] for n in names if n in trained}
            _replace(model, names, whole, layers, tokens)
    for name, _ in model.named_buffers():
        if name in trained:
            _copy(model, name, full_tensors[name])


def fitting_updates(model: PreTrainedModel, adapter: Adapter, trunk: str = "") -> dict[str, Update]:
    """Map the names of layers in `model`, which may be on `meta`, to their updates.

    Args:
        trunk: as in `merge_adapter`.

    Raises:
        UserError: a tensor that fits nowhere, or one that is missing.
    """
    updates, full_tensors, rows = _by_name_in(adapter, trunk)
    updates = placed_updates(model, adapter.config, updates, trunk)
    _check(model, adapter, trunk, updates, full_tensors, rows)
    return updates


def _by_name_in(
    adapter: Adapter, trunk: str
) -> tuple[dict[str, Update], dict[str, torch.Tensor], dict[str, Rows]]:
    """Name updates, full tensors and rows as in the trunk; leave an output head's out.

    Names outside the trunk stay, to be reported.
    """
    prefix = f"{trunk}." if trunk else ""
    own = {
        name: name.removeprefix(prefix)
        for name in (*adapter.updates, *adapter.full_tensors, *adapter.rows)
        if not trunk or name.split(".")[0] not in HEAD_NAMES
    }
    return (
        {own[name]: update for name, update in adapter.updates.items() if name in own},
        {own[name]: full for name, full in adapter.full_tensors.items() if name in own},
        {own[name]: rows for name, rows in adapter.rows.items() if name in own},
    )


def _full_name(name: str, trunk: str) -> str:
    return f"{trunk}.{name}" if trunk else name


def _layer(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")


def _grow(model: PreTrainedModel, full_tensors: dict[str, torch.Tensor]) -> None:
    name = f"{_embedding(model)}.weight"
    rows = full_tensors[name].shape[0] if name in full_tensors else 0
    if rows > full_shape(model.get_parameter(name))[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _check(
    model: PreTrainedModel,
    adapter: Adapter,
    trunk: str,
    updates: dict[str, Update],
    full_tensors: dict[str, torch.Tensor],
    rows: dict[str, Rows],
) -> None:
    modules = dict(model.named_modules())
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    faults = [
        f"no layer {name} to adapt"
        for name in updates
        if name not in own and not isinstance(modules.get(name), (nn.Linear, Conv1D, nn.Embedding))
    ]
    faults += [
        f"{name} does not fit {tuple(full_shape(own[weight]))}"
        for name, update in updates.items()
        if (weight := name if name in own else f"{name}.weight") in own
        and not _fits(modules.get(name), full_shape(own[weight]), update)
    ]
    for name, table in rows.items():
        shape = full_shape(own[f"{name}.weight"]) if f"{name}.weight" in own else torch.Size()
        misfit = table.misfit(name, modules.get(name), shape)
        faults += [misfit] if misfit is not None else []
    faults += [f"unexpected {name}" for name in full_tensors if name not in own]
    faults += [
        f"{name} {tuple(tensor.shape)} does not fit {tuple(full_shape(own[name]))}"
        for name, tensor in full_tensors.items()
        if name in own and tensor.shape != full_shape(own[name])
    ]
    persistent = model.state_dict().keys()
    faults += [
        f"missing {name}"
        for name in own
        if name in persistent
        and name not in full_tensors
        and adapter.config.trains_fully(_full_name(name, trunk))
    ]
    stop_at(faults, f"adapter {adapter.name}: it does not fit its base {adapter.config.base}")


def _fits(module: nn.Module | None, shape: torch.Size, update: Update) -> bool:
    """Return whether A is (r, in), B (out, r), a magnitude (out,), and the layer of the right kind.

    Args:
        module: None for a bare parameter. shape: the weight's; experts each have an A and a B.
    """
    *experts, outer, inner = shape
    if _is_transposed(module, update):
        outer, inner = inner, outer
    rank = update.lora_A.shape[-2]
    return (
        update.of_embedding == isinstance(module, nn.Embedding)
        and update.lora_A.shape == (*experts, rank, inner)
        and update.lora_B.shape == (*experts, outer, rank)
        and (update.magnitude is None or update.magnitude.shape == (outer,))
    )


def _is_transposed(module: nn.Module | None, update: Update) -> bool:
    of_layer = isinstance(module, (Conv1D, nn.Embedding))
    return of_layer if update.transposed is None else update.transposed


def _copy(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    target = getattr(module, leaf)
    with gathered([target], modifier_rank=0):
        target.copy_(tensor)


def _replace(
    model: PreTrainedModel,
    names: list[str],
    trained: dict[str, torch.Tensor],
    layers: dict[str, Update],
    rows: dict[str, Rows],
) -> None:
    """Write merged values to a possibly tied parameter; untie it if they differ."""
    parameter = model.get_parameter(names[0])
    with gathered([parameter], modifier_rank=0):
        values = {}
        for name in names:
            if name in layers:
                layer = model.get_submodule(_layer(name)) if name.endswith(".weight") else None
                values[name] = _updated(layer, parameter, layers[name])
            else:
                values[name] = trained.get(name, parameter).to(parameter, copy=True)
            if name in rows:
                values[name] = rows[name].put_into(values[name])
        same = all(torch.equal(values[names[0]], values[name]) for name in names)
        parameter.copy_(values[names[0]])
    if not same:
        _untie(model, {name: values[name] for name in names[1:]})


def _updated(layer: nn.Module | None, weight: torch.Tensor, update: Update) -> torch.Tensor:
    device, magnitude = weight.device, update.magnitude
    return merged_weight(
        weight,
        update.lora_A.to(device),
        update.lora_B.to(device),
        scaling=update.scaling,
        magnitude=None if magnitude is None else magnitude.to(device),
        transposed=_is_transposed(layer, update),
    )


def _rows_of(model: PreTrainedModel, names: list[str], rows: dict[str, Rows]) -> dict[str, Rows]:
    """Map names of one parameter to trained rows; those of an embedding are its tied head's too."""
    embedding = _embedding(model)
    shared = rows.get(embedding) if f"{embedding}.weight" in names else None
    found = {name: rows.get(_layer(name), shared) for name in names}
    return {name: row for name, row in found.items() if row is not None}


def _embedding(model: PreTrainedModel) -> str:
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)


def _untie(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> None:
    """Replace these names' parameters by separate, unsharded ones (an engine may shard them)."""
    for name, value in values.items():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    model.config.tie_word_embeddings = False
    # transformers noted at the start what it ties again after each resize.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
