"""One rank of the adapter test: folders loaded into shards, trained on, saved from shards.

Started by `launch.run_ranks` with two arguments: the folder that the test made, one to write to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.models.save_plan import plan_saving
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils import zero
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.ds_utils import EngineConfig, get_train_ds_config
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.token_tables import tables_of
from dschat.utils.module.untrained_rows import TokenChoice
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.tiny import byte_tokenizer

CONFIG = EngineConfig(zero_stage=3, dtype="fp32", micro_batch_size=1)
PARTED = "adapter-dora-embedding"  # its head is a whole parameter, which an engine must take too
LORA = LoraConfig(
    lora_dim=4, lora_alpha=6.0, use_dora=True, lora_module_name=("q_proj", "embed_tokens")
)


def load(folder: str, peers: Distributed) -> nn.Module:
    """In shards from the start."""
    create = create_critic_model if "reward" in folder else create_hf_model
    ds_config = get_train_ds_config(CONFIG, peers.world_size)
    module = create(folder, load_hf_tokenizer(folder), torch.float32, ds_config=ds_config)
    # Not the embedding: transformers makes a grown one whole.
    shapes = {p.ndim for name, p in module.named_parameters() if ".layers." in name}
    assert shapes == {1}, f"not built in shards: ndim {shapes}"
    return module


def engine_of(module: nn.Module, peers: Distributed):
    """With fresh adapters of `LORA`."""
    model = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-3), lora=LORA)
    schedule = schedule_factory("constant", 0, 1)
    return build_engine(module, CONFIG, model, schedule, peers.world_size, "adapters")


def main() -> None:
    """Load every adapter of the folder; look for untrained rows; save train-like changes."""
    made, output = map(Path, sys.argv[1:])
    peers, tokenizer = init_distributed(), byte_tokenizer()
    for folder in sorted(made.glob("adapter-*")):
        module = load(str(folder), peers)
        state = zero.consolidated_state_dict(module, peers.rank)
        if peers.is_main:
            torch.save(state, output / f"{folder.name}.pt")
        if folder.name == PARTED:
            engine_of(module, peers).destroy()
    try:
        load(str(made / "misfit"), peers)
    except UserError as error:
        print(f"refused: {error}")
    tables = tables_of(load(str(made / "alike"), peers))
    print(f"untrained: {TokenChoice({3: 'x', 4: 'y'}).reasons(tables)}")
    engine = engine_of(load(str(made / "base"), peers), peers)
    torch.manual_seed(1)
    for layer in lora_layers(engine.module).values():
        own = list(layer.adapter.values())
        with zero.gathered(own, modifier_rank=0), torch.no_grad():
            for parameter in own:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    for mode in ("both", "adapter"):
        plan = plan_saving(
            mode, str(made / "base"), LORA, train_base=False, output_dirs=[output / mode]
        )
        save_hf_format(engine, tokenizer, output / mode, peers, plan)
    engine.destroy()


if __name__ == "__main__":
    main()
