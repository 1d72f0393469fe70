"""Merge a model and write its folder weight by weight: the host holds a shard of it at a time.

Which weights are made of which, and what stands in which file, is planned on `meta`, so every rank
goes through the same units in the same order: under ZeRO-3 all of them gather. Rank 0 merges, on
the device where the weights are, and writes; for that the others wait without a collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dschat.models.folder_plan import FolderPlan, State, live_tensors
from dschat.utils.waiting import from_waiting_main
from dschat.utils.zero import gathered, memory_of


def write_weights(plan: FolderPlan, rank: int, write: Callable[[str, dict], None]) -> None:
    """Make the weights unit by unit, and hand each file's to `write(name, tensors)` on rank 0.

    Every rank calls it. Errors of rank 0 end all ranks at the next file.
    """
    live, pending = live_tensors(plan.module), dict[str, torch.Tensor]()
    missing = {file: set(names) for file, names in plan.files.items()}
    failure: list[Exception] = []

    def flush(file: str) -> str:
        if rank == 0:
            if failure:
                raise failure[0]
            write(file, {name: pending.pop(name) for name in plan.files[file]})
        return ""

    for unit in plan.units:
        tensors = {name: live[name] for name in unit.names}
        with torch.no_grad(), gathered(list({id(t): t for t in tensors.values()}.values())):
            if rank == 0 and not failure:
                try:
                    state = {name: tensor.detach() for name, tensor in tensors.items()}
                    pending |= on_host(plan.convert(unit, state), state)
                except Exception as error:  # the others gather on
                    failure.append(error)
        for file, names in missing.items():
            if names and not (names := names.difference(unit.made)):
                from_waiting_main(functools.partial(flush, file))
            missing[file] = names


def on_host(made: State, live: State) -> dict[str, torch.Tensor]:
    """Copy what is not on the CPU, or is the live model's, or part of something larger."""
    held, places = {}, {memory_of(tensor) for tensor in live.values()}
    for name, tensor in made.items():
        tensor = tensor.to("cpu")
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
        if is_part or memory_of(tensor) in places:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        held[name] = tensor.contiguous()
    return held
