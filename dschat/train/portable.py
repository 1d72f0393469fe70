"""Portable checkpoints: stored by parameter name, so that any ranks and ZeRO stage can resume.

DeepSpeed's own files hold each rank's part of flat buffers. This module reads them, safely and
without a process group, and joins the parts: `ENGINE.safetensors` has the complete fp32 weight and
optimizer state of every trained parameter, and `ENGINE.pt` the rest. DeepSpeed's universal format
is not used: loading it unpickles arbitrary objects, and it does not support engines without ZeRO.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dschat.errors import UserError
from dschat.train import checkpoint_folder
from dschat.train.safe_load import load_file
from dschat.utils.files import sync, sync_tree

WEIGHT, STEP = "weight", "step"
Shapes = Mapping[str, Sequence[int]]  # of parameters by name, in the optimizer's order
State = dict[str, dict[str, torch.Tensor]]  # WEIGHT and the optimizer's keys → name → tensor


def write_portable(folder: Path, record: Mapping[str, Any], target: Path) -> None:
    """Convert the checkpoint of this record to portable form; `target` appears when complete.

    Raises:
        UserError: it is portable already, or of a version or an optimizer that this cannot convert.
    """
    if record.get("portable"):
        raise UserError(f"{folder}: is portable already; resume from it")
    if target.exists():
        raise UserError(f"{target}: is there already; give another folder")
    part = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, engine in record["engines"].items():
            _write_engine(folder, name, engine.get("parameters"), record["processes"], part)
        _copy_others(folder, part, record["engines"])
        kept = {k: v for k, v in record.items() if k not in ("format", "files")}
        digests = checkpoint_folder.digests_of(part, checkpoint_folder.names_in(part))
        checkpoint_folder.write_record(part, {**kept, "portable": True}, digests)
        sync_tree(part)
        part.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); free some space") from (
            error
        )
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_engine(
    folder: Path, name: str, groups: Mapping[str, Shapes] | None, processes: int, part: Path
) -> None:
    if groups is None:
        raise UserError(
            f"{folder}: of a version that did not list the {name}'s parameters; resume it as it "
            "is and save once more"
        )
    state, facts = read_engine(folder / name, groups, processes)
    flat = {f"{key}.{n}": t.contiguous() for key, of in state.items() for n, t in of.items()}
    save_file(flat, part / f"{name}.safetensors")
    torch.save(facts, part / f"{name}.pt")


def _copy_others(folder: Path, part: Path, engines: Mapping[str, Any]) -> None:
    """Copy what is saved beside the engines; join the average's shards, keep every generator."""
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        stem, _, rank = file.stem.partition("-rank-")
        if file.name == checkpoint_folder.RECORD:
            continue
        if not rank or stem == "random":
            shutil.copyfile(file, part / file.name)
        elif int(rank) == 0 and stem == "ema":
            shards = [load_file(str(shard)) for shard in sorted(folder.glob("ema-rank-*.pt"))]
            shapes = {n: s for of in engines["actor"]["parameters"].values() for n, s in of.items()}
            whole = {n: _joined([shard[n] for shard in shards], shapes[n]) for n in shards[0]}
            torch.save(whole, part / f"{stem}.pt")
        elif int(rank) == 0:  # the same on all of them
            shutil.copyfile(file, part / f"{stem}.pt")


def _joined(pieces: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Join the pieces of all ranks, without the padding of the last one."""
    flat = torch.cat([piece.flatten() for piece in pieces])
    count = torch.Size(shape).numel()
    return flat[:count].reshape(tuple(shape)).clone()


def read_engine(
    folder: Path, groups: Mapping[str, Shapes], processes: int
) -> tuple[State, dict[str, Any]]:
    """Read an engine's files: the state of each parameter, and the plain facts beside it."""
    shards = sorted(folder.glob("*_optim_states.pt"))
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not models or len(shards) not in (0, processes):
        raise UserError(f"{folder}: not the files of {processes} processes; copy the folder again")
    model = load_file(str(models[0]))
    names = [name for shapes in groups.values() for name in shapes]
    if shards:
        optimizers = [load_file(str(file))["optimizer_state_dict"] for file in shards]
        read = _read_stage_3 if "fp32_flat_groups" in optimizers[0] else _read_stages_1_and_2
        state, steps = read(optimizers, groups)
        own = optimizers[0].get("base_optimizer_state", optimizers[0].get("optimizer_state_dict"))
        scaler = optimizers[0].get("loss_scaler")
    else:
        own, scaler = model["optimizer"], None
        state, steps = _read_stage_0(own, model["module"], groups)
    facts = {
        "steps": steps,
        "rates": [{k: g[k] for k in ("lr", "initial_lr")} for g in own["param_groups"]][
            : len(groups)
        ],
        "schedule": model["lr_scheduler"],
        "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))}
        if scaler is not None
        else {},
        "counters": {k: model[k] for k in ("global_steps", "global_samples", "skipped_steps")},
        "buffers": {n: t for n, t in model["module"].items() if n not in names},
    }
    return state, facts


def _read_stage_0(
    optimizer: Mapping[str, Any], module: Mapping[str, torch.Tensor], groups: Mapping[str, Shapes]
) -> tuple[State, dict[str, float]]:
    names = [name for shapes in groups.values() for name in shapes]
    state: State = {WEIGHT: {name: module[name].float() for name in names}}
    steps = {}
    for number, name in enumerate(names):
        own = optimizer["state"].get(number, {})
        steps[name] = float(own.get(STEP, 0.0))
        for key in _keys(optimizer["state"]):
            value = own.get(key)
            of_key = state.setdefault(key, {})
            of_key[name] = torch.zeros_like(state[WEIGHT][name]) if value is None else value.float()
    return state, steps


def _read_stages_1_and_2(
    shards: Sequence[Mapping[str, Any]], groups: Mapping[str, Shapes]
) -> tuple[State, dict[str, float]]:
    """Read shards of flat buffers, one buffer a group; a parameter may span several ranks."""
    state: State = {}
    steps: dict[str, float] = {}
    for number, shapes in enumerate(groups.values()):
        base = [shard["base_optimizer_state"]["state"] for shard in shards]
        flats = {WEIGHT: [s["single_partition_of_fp32_groups"][number] for s in shards]}
        for key in _keys(base[0]):
            flats[key] = [rank[number][key] for rank in base]
        for name, shape in shapes.items():
            steps[name] = float(base[0][number][STEP])
            for key, flat in flats.items():
                pieces = []
                for rank, shard in enumerate(shards):
                    at = shard["param_slice_mappings"][number].get(name)
                    if at is not None:
                        pieces.append(flat[rank].flatten()[at.start : at.start + at.numel])
                state.setdefault(key, {})[name] = _joined(pieces, shape).float()
    return state, steps


def _read_stage_3(
    shards: Sequence[Mapping[str, Any]], groups: Mapping[str, Shapes]
) -> tuple[State, dict[str, float]]:
    """Read shards of parameters: each rank has an equal part of each, in flat buffers."""
    base = [shard["optimizer_state_dict"]["state"] for shard in shards]
    order = sorted(base[0])
    flats = {WEIGHT: [torch.cat([*shard["fp32_flat_groups"]]) for shard in shards]}
    for key in _keys(base[0]):
        flats[key] = [torch.cat([rank[i][key].flatten() for i in order]) for rank in base]
    step, at = float(base[0][order[0]][STEP]), 0
    state: State = {}
    steps: dict[str, float] = {}
    for shapes in groups.values():
        for name, shape in shapes.items():
            size = -(-torch.Size(shape).numel() // len(shards))
            for key, flat in flats.items():
                pieces = [rank[at : at + size] for rank in flat]
                state.setdefault(key, {})[name] = _joined(pieces, shape).float()
            steps[name] = step
            at += size
    return state, steps


def _keys(states: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """List the keys of optimizer state that has the shape of the weight.

    Raises:
        UserError: an optimizer with any other state but its step count.
    """
    found: dict[str, None] = {}
    for own in states.values():
        if STEP not in own:
            raise UserError("an optimizer that counts no steps cannot be converted; use AdamW")
        for key, value in own.items():
            if key != STEP:
                if not torch.is_tensor(value) or (value.numel() < 2 and value.ndim == 0):
                    raise UserError(f"an optimizer with {key!r} cannot be converted; use AdamW")
                found[key] = None
    return [*found]
