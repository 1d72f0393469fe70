"""One rank of the agreement test: trains cells; rank 0 writes weights and rates.

Started by `launch.run_ranks` with a folder to write to, a folder of models to read from, and the
cells' names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from dschat.functional.losses import mean_scale, pairwise_loss
from dschat.models.causal_lm import create_hf_model
from dschat.models.logprobs import target_loss
from dschat.models.reward_model import create_critic_model, scores_at_end
from dschat.models.right_padding import needed_mask, right_padded_inputs
from dschat.train.engine import backward, build_engine, torch_dtype
from dschat.train.steps import accumulation_groups
from dschat.utils import zero
from dschat.utils.distributed import Distributed, all_reduce_sum, init_distributed
from dschat.utils.ds_utils import get_train_ds_config
from dschat.utils.module.lora import lora_layers
from dschat.utils.optim import group_rates
from dschat.utils.schedules import schedule_factory
from tests.helpers.tiny import byte_tokenizer
from tests.train import cells


def build(cell: cells.Cell, folder: str, ds_config: dict) -> nn.Module:
    """The cell's model, whole or (from a folder, at stage 3) in shards from the start."""
    dtype = torch_dtype(cell.dtype)
    if cell.built_from == "module":
        return cells.build_module(cell.model).to(dtype)
    create = create_critic_model if cell.model == "reward" else create_hf_model
    name = f"{folder}/{cell.model}"
    module = create(name, byte_tokenizer(), dtype, ds_config=ds_config)
    trunk = module.rwtransformer if cell.model == "reward" else module
    shapes = {p.ndim for p in trunk.parameters()}
    assert shapes == {1}, f"not built in shards: ndim {shapes}"
    return module


def loss_and_count(engine: nn.Module, cell: cells.Cell, rows: list[int]) -> tuple:
    """This rank's summed loss as a function to call, and how many terms it sums."""
    if cell.model != "reward":
        ids, mask, loss_mask = cells.sft_batch(rows)

        def sft() -> torch.Tensor:
            return target_loss(engine, right_padded_inputs(engine, ids, mask), loss_mask)

        return sft, loss_mask[:, 1:].sum().item()
    ids, mask, real = cells.pair_batch(rows, size=max(4, len(rows)))

    def pairwise() -> torch.Tensor:
        scores = scores_at_end(engine(ids, needed_mask(engine, ids, mask)), mask)
        return pairwise_loss(*scores.chunk(2), real)

    return pairwise, len(rows)


def moves(before: dict, after: dict) -> dict[str, list[float]]:
    """Median and largest |change| over all elements of the A's, and of the B's."""
    changes = {}
    for kind in ("lora_A", "lora_B"):
        parts = [(after[n] - before[n]).abs().flatten() for n in after if kind in n]
        if parts:
            every = torch.cat(parts).float()
            changes[kind] = [every.median().item(), every.max().item()]
    return changes


def train(cell: cells.Cell, peers: Distributed, folder: str) -> tuple[dict, dict]:
    """Full weights after the last step, and what is told about the way there (on rank 0)."""
    micro = 8 // cell.accumulation // peers.world_size
    config = cell.engine_config(micro, folder)
    module = build(cell, folder, get_train_ds_config(config, peers.world_size))
    name = "constant" if cell.first_steps else "linear"
    schedule = schedule_factory(name, cells.WARM_UP, cells.TOTAL_STEPS)
    torch.manual_seed(cells.ADAPTER_SEED)
    engine = build_engine(module, config, cell.config(), schedule, peers.world_size, cell.name)
    assert all(module.training for module in engine.module.modules())
    story = {
        "fused": engine.basic_optimizer.defaults["fused"],
        "groups": {g["name"]: g["weight_decay"] for g in engine.optimizer.param_groups},
        "rates": [group_rates(engine.optimizer)],
        "losses": [],
        "moves": [],
    }
    before = zero.consolidated_state_dict(engine.module, peers.rank) if cell.first_steps else {}
    for micro_batches in accumulation_groups(cells.row_numbers(cell), cell.accumulation):
        mine = [rows[peers.rank :: peers.world_size] for rows in micro_batches]
        parts = [loss_and_count(engine, cell, rows) for rows in mine]
        (total,) = all_reduce_sum([sum(count for _, count in parts)])
        scale, loss_sum = mean_scale(total, peers.world_size), 0.0
        for i, (loss_of, _) in enumerate(parts):
            loss = loss_of()
            backward(engine, loss * scale, last=i == len(parts) - 1)
            loss_sum += loss.item()
        engine.step()
        story["rates"].append(group_rates(engine.optimizer))
        story["losses"].append(all_reduce_sum([loss_sum])[0] / total)
        if cell.first_steps:
            after = zero.consolidated_state_dict(engine.module, peers.rank)
            story["moves"].append(moves(before, after))
            before = after
    weights = zero.consolidated_state_dict(engine.module, peers.rank)
    if cell.quantize is not None:
        packed = lora_layers(engine.module).items()
        weights |= {f"{name}.weight": layer.dense_weight() for name, layer in packed}
    engine.destroy()
    return weights, story


def main() -> None:
    """Train the cells; write `<name>.pt` for each and one `story.json`."""
    output, folder, *names = sys.argv[1:]
    peers = init_distributed()
    stories = {}
    for cell in (cell for cell in cells.all_cells() if cell.name in names):
        weights, stories[cell.name] = train(cell, peers, folder)
        if peers.is_main:
            torch.save(weights, Path(output) / f"{cell.name}.pt")
    if peers.is_main:
        (Path(output) / "story.json").write_text(json.dumps(stories))


if __name__ == "__main__":
    main()
