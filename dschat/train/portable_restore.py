"""Put a portable checkpoint's state into an engine of any number of ranks and ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dschat.errors import UserError
from dschat.train.engine import Engine
from dschat.train.portable import STEP, WEIGHT
from dschat.train.safe_load import load_file
from dschat.utils.distributed import Distributed, print_rank_0, set_random_seed
from dschat.utils.zero import full_shape, is_partitioned, own_part, set_local_shard

Get = Callable[[str, str], torch.Tensor]  # key and name → the whole tensor


def restore_portable(engine: Engine, folder: Path, name: str) -> None:
    """Fill an engine: fp32 weights, optimizer, schedule, loss scaler, counters.

    Raises:
        UserError: an optimizer other than torch's.
    """
    facts = load_file(str(folder / f"{name}.pt"))
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not type(base).__module__.startswith("torch.optim"):
        raise UserError(
            f"resume {folder}: the optimizer {type(base).__name__} of deepspeed_config takes no "
            "portable checkpoint; drop the optimizer block"
        )
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        entries = [entry.split(".", 1) for entry in file.keys()]  # noqa: SIM118 (not a mapping)
        found = {(key, n): tuple(file.get_slice(f"{key}.{n}").get_shape()) for key, n in entries}
        wanted = {n: tuple(full_shape(p)) for n, p in trained.items()}
        if {n: s for (key, n), s in found.items() if key == WEIGHT} != wanted:
            raise UserError(f"resume {folder}: its {name} has other parameters than this one")
        keys = sorted({key for key, _ in entries} - {WEIGHT})

        def get(key: str, parameter: str) -> torch.Tensor:
            return file.get_tensor(f"{key}.{parameter}")

        with torch.no_grad():
            _fill(engine, base, trained, keys, get, facts["steps"])
    engine.module.load_state_dict(facts["buffers"], strict=False)
    for group, saved in zip(engine.optimizer.param_groups, facts["rates"], strict=True):
        group.update(saved)
    engine.lr_scheduler.load_state_dict(facts["schedule"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for key, value in facts["scaler"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)
    for key, value in facts["counters"].items():
        setattr(engine, key, value)


def _fill(
    engine: Engine,
    base: torch.optim.Optimizer,
    trained: Mapping[str, torch.nn.Parameter],
    keys: list[str],
    get: Get,
    steps: Mapping[str, float],
) -> None:
    zero: Any = engine.optimizer
    flats: dict[torch.Tensor, float] = {}  # what the optimizer steps on, and its count of steps
    for name, parameter in trained.items():
        if is_partitioned(parameter):
            number, start, length = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[number]
            part = own_part(parameter, get(WEIGHT, name))
            set_local_shard(parameter, part)
            _put(base, flat, {WEIGHT: part}, start, length)
            _put(base, flat, {k: own_part(parameter, get(k, name)) for k in keys}, start, length)
        elif hasattr(parameter, "_hp_mapping"):
            mapping: Any = parameter._hp_mapping  # None where another rank has all of it
            flat = None
            if mapping is not None:
                flat = _flat_of(zero)[mapping.param_group_index]
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                cut = {k: get(k, name).flatten() for k in (WEIGHT, *keys)}
                cut = {k: t[here.start : here.start + here.numel] for k, t in cut.items()}
                _put(base, flat, cut, there.start, there.numel)
        else:
            flat = parameter
            parameter.copy_(get(WEIGHT, name))
            whole = {k: get(k, name).flatten() for k in keys}
            _put(base, flat, whole, 0, parameter.numel())
        if flat is not None:
            flats[flat] = max(flats.get(flat, 0.0), steps[name])
    for flat, step in flats.items():
        group = next(g for g in base.param_groups if g is not None)
        on = flat.device if group.get("fused") or group.get("capturable") else "cpu"
        base.state[flat][STEP] = torch.tensor(step, dtype=torch.float32, device=on)
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _flat_of(zero: Any) -> list[torch.Tensor]:
    """The fp32 buffers of this rank, one a group."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return zero.single_partition_of_fp32_groups
    return zero.fp32_groups_flat_partition  # DeepSpeed's BF16_Optimizer


def _put(
    base: torch.optim.Optimizer,
    flat: torch.Tensor,
    values: Mapping[str, torch.Tensor],
    start: int,
    length: int,
) -> None:
    """Write flat values into a buffer, or into the optimizer's state of it."""
    for key, value in values.items():
        if key == WEIGHT:
            target = flat.data
        else:
            target = base.state[flat].setdefault(key, torch.zeros_like(flat.data))
        target.view(-1)[start : start + length].copy_(value.flatten())


def start_generators_anew(seed: int, step: int, ranks: int, now: Distributed) -> None:
    """Seed this rank by the step: the generators that were saved are of other ranks."""
    set_random_seed(seed + 1_000_003 * step + now.rank)
    print_rank_0(
        f"resume: {ranks} ranks saved, {now.world_size} go on; dropout and sampling draw other "
        "numbers than a run that had not stopped"
    )
