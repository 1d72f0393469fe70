"""An adapter read from disk, added to the weights of its loaded base."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.utils.module.adapter import Adapter, Update, stop_at
from dschat.utils.module.lora import HEAD_NAMES
from dschat.utils.module.lora_layers import merged_weight
from dschat.utils.zero import full_shape, gathered


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter, trunk: str = "") -> None:
    """Add the updates to the weights, in place, in fp32 and cast once; also under ZeRO-3.

    Tables with more rows than the model's grow it. Weights that two layers share part where the
    adapter treats the two differently.

    Args:
        trunk: where `model` is the trunk alone, the name that it has in the adapter's model
            (`model`); what belongs to the output head is then left out.

    Raises:
        UserError: a tensor that fits nowhere, or one that is missing.
    """
    updates, plain = _under_own_names(adapter, trunk)
    _grow(model, plain)
    _check(model, adapter, trunk, updates, plain)
    whole = {n for n in plain if adapter.config.trains_whole(_full(n, trunk))}
    for name, tensor in plain.items():
        if name not in whole:  # the base's table as it was in training, for all who share it
            _copy(model, name, tensor)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for names in users.values():
        layers = {n: updates[n.removesuffix(".weight")] for n in names if _layer(n) in updates}
        if layers or whole & {*names}:
            _replace(model, names, {n: plain[n] for n in names if n in whole}, layers)
    for name, _ in model.named_buffers():
        if name in whole:
            _copy(model, name, plain[name])


def fitting_updates(model: PreTrainedModel, adapter: Adapter, trunk: str = "") -> dict[str, Update]:
    """The updates by the layers' names in `model`, which may be on `meta`; as `merge_adapter`.

    Raises:
        UserError: a tensor that fits nowhere, or one that is missing.
    """
    updates, plain = _under_own_names(adapter, trunk)
    _check(model, adapter, trunk, updates, plain)
    return updates


def _under_own_names(
    adapter: Adapter, trunk: str
) -> tuple[dict[str, Update], dict[str, torch.Tensor]]:
    """Updates and whole tensors by their names in the trunk, an output head's left out."""
    updates = {_own(name, trunk): update for name, update in adapter.updates.items()}
    plain = {_own(name, trunk): tensor for name, tensor in adapter.plain.items()}
    updates.pop(None, None)
    plain.pop(None, None)
    return updates, plain


def _full(name: str, trunk: str) -> str:
    return f"{trunk}.{name}" if trunk else name


def _own(name: str, trunk: str) -> str | None:
    """The name in the trunk; None for an output head's; any other stays, to be reported."""
    if not trunk or name.startswith(f"{trunk}."):
        return name[len(trunk) + 1 :] if trunk else name
    return None if name.split(".")[0] in HEAD_NAMES else name


def _layer(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")


def _grow(model: PreTrainedModel, plain: dict[str, torch.Tensor]) -> None:
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    rows = plain[f"{name}.weight"].shape[0] if f"{name}.weight" in plain else 0
    if rows > full_shape(table.weight)[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _check(
    model: PreTrainedModel,
    adapter: Adapter,
    trunk: str,
    updates: dict[str, Update],
    plain: dict[str, torch.Tensor],
) -> None:
    modules = dict(model.named_modules())
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    faults = [
        f"no layer {name} to adapt"
        for name in updates
        if not isinstance(modules.get(name), (nn.Linear, Conv1D, nn.Embedding))
    ]
    faults += [
        f"{name} does not fit {tuple(full_shape(modules[name].weight))}"
        for name, update in updates.items()
        if name in modules and not _fits(modules[name], update)
    ]
    faults += [f"unexpected {name}" for name in plain if name not in own]
    faults += [
        f"{name} {tuple(tensor.shape)} does not fit {tuple(full_shape(own[name]))}"
        for name, tensor in plain.items()
        if name in own and tensor.shape != full_shape(own[name])
    ]
    persistent = model.state_dict().keys()
    faults += [
        f"missing {name}"
        for name in own
        if name in persistent
        and name not in plain
        and adapter.config.trains_whole(_full(name, trunk))
    ]
    stop_at(faults, f"adapter {adapter.name}: it does not fit its base {adapter.config.base}")


def _fits(module: nn.Module, update: Update) -> bool:
    """Whether A is (r, in), B (out, r) and a magnitude (out,), of the right kind of layer."""
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        return True  # reported already
    shape = full_shape(module.weight)
    inner, outer = shape if _is_transposed(module) else reversed(shape)
    rank = update.lora_A.shape[0]
    return (
        update.of_embedding == isinstance(module, nn.Embedding)
        and update.lora_A.shape == (rank, inner)
        and update.lora_B.shape == (outer, rank)
        and (update.magnitude is None or update.magnitude.shape == (outer,))
    )


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, (Conv1D, nn.Embedding))


def _copy(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    target = getattr(module, leaf)
    with gathered([target], modifier_rank=0):
        target.copy_(tensor)


def _replace(
    model: PreTrainedModel,
    names: list[str],
    whole: dict[str, torch.Tensor],
    layers: dict[str, Update],
) -> None:
    """Give the parameter that has these names its new value, or each name one of its own."""
    parameter = model.get_parameter(names[0])
    with gathered([parameter], modifier_rank=0):
        values = {}
        for name in names:
            if name in layers:
                module = model.get_submodule(_layer(name))
                values[name] = _updated(module, parameter, layers[name])
            else:
                values[name] = whole.get(name, parameter).to(parameter, copy=True)
        same = all(torch.equal(values[names[0]], values[name]) for name in names)
        parameter.copy_(values[names[0]])
    if not same:
        _part(model, {name: values[name] for name in names[1:]})


def _updated(module: nn.Module, weight: torch.Tensor, update: Update) -> torch.Tensor:
    device, magnitude = weight.device, update.magnitude
    return merged_weight(
        weight,
        update.lora_A.to(device),
        update.lora_B.to(device),
        scaling=update.scaling,
        magnitude=None if magnitude is None else magnitude.to(device),
        transposed=_is_transposed(module),
    )


def _part(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> None:
    """Untie: these names get parameters of their own (whole ones, which an engine may shard)."""
    for name, value in values.items():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    model.config.tie_word_embeddings = False
    # transformers noted at the start what it ties again after each resize.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
