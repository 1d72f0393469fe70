"""One rank of the test of scores: reward models in engines of every ZeRO stage, scored and saved.

Started by `launch.run_ranks` with the folder of models, one to write to, and cells: `FAMILY,STAGE`,
with `,adapter` where the adapter is loaded instead of the merged weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.models.save_plan import plan_saving
from dschat.train.engine import build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils import zero
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.scores import all_ways
from tests.helpers.tiny import byte_tokenizer

LORA = LoraConfig(lora_dim=4)
MODEL = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-3), lora=LORA)


def move(module: nn.Module) -> None:
    """Add the same numbers to the adapters and the head in every cell."""
    torch.manual_seed(1)
    for layer in [*lora_layers(module).values(), module.v_head]:
        own = list(layer.adapter.values() if hasattr(layer, "adapter") else layer.parameters())
        with zero.gathered(own, modifier_rank=0), torch.no_grad():
            for parameter in own:
                parameter.add_(0.1 * torch.randn(parameter.shape))


def run(made: Path, output: Path, cell: str, peers: Distributed) -> dict[str, torch.Tensor]:
    """Scores as loaded, and with moved adapters, which are then saved."""
    name, stage, *parts = cell.split(",")
    config = EngineConfig(zero_stage=int(stage), dtype="fp32", micro_batch_size=1)
    source, tokenizer = str(Path(made, name, *parts)), byte_tokenizer()
    ds_config = get_train_ds_config(config, peers.world_size)
    module = create_critic_model(source, tokenizer, torch.float32, ds_config=ds_config)
    schedule = schedule_factory("constant", 0, 1)
    engine = build_engine(module, config, MODEL, schedule, peers.world_size, cell)
    engine.eval()
    scores = {"loaded": all_ways(engine)}
    move(engine.module)
    scores["moved"] = all_ways(engine)
    out = output / cell
    plan = plan_saving("both", source, LORA, train_base=False, output_dirs=[out])
    save_hf_format(engine, tokenizer, out, peers, plan)
    engine.destroy()
    return scores


def main() -> None:
    """Every rank's scores, in a file of its own."""
    made, output, *cells = sys.argv[1:]
    peers = init_distributed()
    scores = {cell: run(Path(made), Path(output), cell, peers) for cell in cells}
    torch.save(scores, Path(output) / f"scores-{peers.rank}.pt")


if __name__ == "__main__":
    main()
