"""What a plan says of several ranks, held against engines on ranks of this machine (gloo).

    python -m benchmarks.plan_on_ranks                    # 2 ranks; LoRA and all weights; ZeRO 0-3
    python -m benchmarks.plan_on_ranks --ranks 4 --families llama --accumulation 1 --dtype fp32

Memory: bytes that a rank holds between two optimizer steps, counted from the tensors themselves
(weights, adapters, masters and moments) and, for the rest, from all storages that live.

Sending: every collective of a step is noted with the sizes of its tensors, and counts as its best
algorithm sends it: an all-gather or a reduce-scatter of S bytes in all brings a rank S (n-1)/n, an
all-reduce twice that, a broadcast S. Beside it stands what the plan says, and the paper's count
(ZeRO, arXiv:1910.02054, section 7): 2 P below stage 3 and 3 P at stage 3, P the trained parameters;
a frozen base of F adds 2 F at stage 3. `LARGE` lets nothing stay gathered, as in a model that is
much larger.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig

from dschat.models.config import build_causal_lm
from dschat.plan.counting import Allocations
from dschat.plan.fake_step import Shape, without_weights
from dschat.plan.roles import Role
from dschat.plan.speed import training_traffic
from dschat.plan.states import ADAPTERS, OPTIMIZER, WEIGHTS, Counted, engine_states
from dschat.train.engine import Engine, backward, build_engine, torch_dtype
from dschat.train.model_config import ModelConfig
from dschat.utils import rank_watch
from dschat.utils.distributed import init_distributed
from dschat.utils.ds_utils import ZERO_STAGES, EngineConfig
from dschat.utils.module.lora import is_adapter_key
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from dschat.utils.zero import local_shard

TEXT = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
GPT2 = {
    "vocab_size": 512,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "opt": AutoConfig.for_model("opt", **TEXT, ffn_dim=256, word_embed_proj_dim=128),
    "llama": AutoConfig.for_model("llama", **TEXT),
    "qwen3": AutoConfig.for_model("qwen3", **TEXT),
    "gemma3": AutoConfig.for_model("gemma3_text", **TEXT),
    "gpt2": AutoConfig.for_model("gpt2", **GPT2),
}
REST = "gradients and buckets"
# Of a model that is much larger: nothing stays gathered.
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Cell:
    """One engine: its model, what trains, its ZeRO stage."""

    family: str
    lora_dim: int
    stage: int
    dtype: str
    accumulation: int


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring a rank inside the block, by their names."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.bytes = ranks, Counter[str]()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operation; note it where it is a collective."""
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.bytes[name] += self._received(name, args)
        return func(*args, **(kwargs or {}))

    def _received(self, name: str, args: tuple) -> float:
        """Bytes of a tensor of all ranks, and how often a rank gets the others' parts of it."""
        sizes = [
            [t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)] for arg in args
        ]
        whole, others = max(sum(size) for size in sizes), (self.ranks - 1) / self.ranks
        if name.startswith("allreduce"):
            return 2 * whole * others
        return whole * (1.0 if name.startswith("broadcast") else others)


def cells(families: list[str], accumulation: int, dtype: str) -> Iterator[Cell]:
    """Adapters and all weights of each family at each stage."""
    for family in families:
        for lora_dim in (8, 0):
            for stage in ZERO_STAGES:
                yield Cell(family, lora_dim, stage, dtype, accumulation)


def measured(cell: Cell, ranks: int, json_file: Path) -> dict[str, Any]:
    """Count an optimizer step of a cell's engine; what is planned, and what the paper says."""
    config = EngineConfig(
        zero_stage=cell.stage,
        dtype=cell.dtype,
        micro_batch_size=1,
        gradient_accumulation_steps=cell.accumulation,
        deepspeed_config=str(json_file),
    )
    model = ModelConfig(optimizer=OptimizerConfig(1e-4), lora=LoraConfig(lora_dim=cell.lora_dim))
    shape = Shape(CONFIGS[cell.family], build_causal_lm, model, torch_dtype(cell.dtype))
    planned = without_weights(shape)
    counted = Counted.of(planned, model.lora)
    role = Role(shape, engine_states(counted, config, ranks), counted, planned, config)
    module = build_causal_lm(CONFIGS[cell.family]).to(torch_dtype(cell.dtype))
    schedule = schedule_factory("constant", 0, 10)
    with Allocations() as living:
        for parameter in module.parameters():
            living.add(parameter)
        engine = build_engine(module, config, model, schedule, ranks, "plan")
        step(engine, cell.accumulation)  # ZeRO-3 learns the order of its layers in the first
        gc.collect()
        held = by_kind(engine, living.live)
        with Received(ranks) as received:
            step(engine, cell.accumulation)
    engine.destroy()
    size = torch_dtype(cell.dtype).itemsize
    others = (ranks - 1) / ranks
    trained = counted.trained * size
    frozen = (counted.base + counted.adapters) * size - trained
    paper = 2 * trained if cell.stage < 3 else cell.accumulation * (2 * frozen + 3 * trained)
    plan = sum(training_traffic(role, cell.accumulation, 1, ranks))
    states = {kind: role.states.held.get(kind, 0.0) for kind in (WEIGHTS, ADAPTERS, OPTIMIZER)}
    states[REST] = sum(role.states.held.values()) - sum(states.values())
    return {
        "held": held,
        "held, planned": states,
        "counted": float(sum(received.bytes.values())),
        "planned": plan * others,
        "paper": paper * others,
    }


def by_kind(engine: Engine, everything: int) -> dict[str, float]:
    """Bytes of an engine's weights, adapters, optimizer; the rest are gradients and buckets."""
    found = dict.fromkeys((WEIGHTS, ADAPTERS, OPTIMIZER), 0.0)
    own = set()
    for name, parameter in engine.module.named_parameters():
        tensor = local_shard(parameter)
        own.add(tensor.untyped_storage()._cdata)
        found[ADAPTERS if is_adapter_key(name) else WEIGHTS] += tensor.nbytes
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # of ZeRO-3
    moments = [t for state in inner.state.values() for t in tree_leaves(state)]
    for tensor in (*masters, *moments):
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in own:
            found[OPTIMIZER] += tensor.nbytes
    return found | {REST: everything - sum(found.values())}


def step(engine: Engine, passes: int) -> None:
    """Make one optimizer step."""
    ids = torch.arange(3, 35)[None]
    for i in range(passes):
        loss = engine(input_ids=ids, use_cache=False).logits.float().mean()
        backward(engine, loss, last=i == passes - 1)
    engine.step()


def work(rank: int, port: int, chosen: list[Cell], ranks: int, folder: str) -> None:
    """Be one rank; rank 0 writes what it found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    init_distributed()
    json_file = Path(folder, f"ds.{rank}.json")
    json_file.write_text(json.dumps({"zero_optimization": LARGE}))
    found = []
    for cell in chosen:
        torch.manual_seed(0)
        found.append(vars(cell) | measured(cell, ranks, json_file))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    rank_watch.stop()


def count(chosen: list[Cell], ranks: int) -> list[dict[str, Any]]:
    """Count all cells on so many ranks; figures are bytes that rank 0 receives in a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=work, args=(rank, port, chosen, ranks, folder))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed; its error is above")
        return json.loads(Path(folder, "found.json").read_text())


def main() -> None:
    """Count, and print a line for each engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--families", nargs="+", default=[*CONFIGS], choices=[*CONFIGS])
    args = parser.parse_args()
    found = count(list(cells(args.families, args.accumulation, args.dtype)), args.ranks)
    print("kB a rank, counted / planned; the last column is the counted traffic over the paper's")
    kinds = [WEIGHTS, ADAPTERS, OPTIMIZER, REST]
    print(f"| model | trains | ZeRO | {' | '.join(kinds)} | received | paper |")
    print("| --- " * (len(kinds) + 5) + "|")
    for row in found:
        trains = f"LoRA {row['lora_dim']}" if row["lora_dim"] else "all"
        held = [(row["held"][kind], row["held, planned"][kind]) for kind in kinds]
        pairs = [*held, (row["counted"], row["planned"])]
        cells_of_row = [f"{a / 1e3:.1f} / {b / 1e3:.1f}" for a, b in pairs]
        print(
            f"| {row['family']} | {trains} | {row['stage']} | {' | '.join(cells_of_row)} | "
            f"{row['counted'] / row['paper']:.2f} |"
        )


if __name__ == "__main__":
    main()
