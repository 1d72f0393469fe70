"""One of two ranks: collectives of an optimizer step at each ZeRO stage, printed by rank 0."""

from __future__ import annotations

import json

import torch

from dschat.train.engine import Engine, backward, build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.ds_utils import ZERO_STAGES, EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.recorder import Recorder
from tests.helpers.tiny import tiny_llama


def engine_of(stage: int, peers: Distributed) -> Engine:
    """A language model whose adapters train, two micro-batches a step."""
    config = EngineConfig(
        zero_stage=stage, dtype="fp32", micro_batch_size=1, gradient_accumulation_steps=2
    )
    model = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-4), lora=LoraConfig(lora_dim=4))
    schedule = schedule_factory("constant", 0, 10)
    return build_engine(tiny_llama(), config, model, schedule, peers.world_size, "collectives")


def step(engine: Engine) -> None:
    """Make one optimizer step."""
    for last in (False, True):
        loss = engine(input_ids=torch.arange(3, 35)[None], use_cache=False).logits.sum()
        backward(engine, loss, last)
    engine.step()


if __name__ == "__main__":
    peers = init_distributed()
    found = {}
    for stage in ZERO_STAGES:
        engine = engine_of(stage, peers)
        step(engine)
        with Recorder() as recorder:
            step(engine)
        found[f"ZeRO {stage}"] = {
            name: f"{calls} calls, {size} bytes"
            for name, (calls, size) in sorted(recorder.collectives.items())
        }
        engine.destroy()
    if peers.rank == 0:
        print(f"\nFOUND {json.dumps(found)}", flush=True)
