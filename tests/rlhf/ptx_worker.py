"""One rank of the PTX agreement test: `ptx_worker.py ROLLOUT FOLDER OUT`.

Every rank trains on its share of one rollout and of one set of blocks. Rank 0 writes what came.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import torch
from torch import nn

from dschat.data.text_blocks import TextBlocks
from dschat.rlhf.experience import Experience
from dschat.rlhf.ptx import PTX
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict
from tests.rlhf.ppo_worker import share
from tests.rlhf.tiny_roles import LORA, Folders, Setting, ppo_trainer

CELLS = {
    "zero 0, full": Setting(micro_batch=1, accumulation=2),
    "zero 2, full": Setting(micro_batch=2, zero_stage=2),
    "zero 3, lora": Setting(
        micro_batch=1, accumulation=2, zero_stage=3, lora=LORA, gradient_checkpointing=True
    ),
}
COEFFICIENT, SEED, BLOCKS, LENGTH = 0.7, 3, 7, 12


def blocks() -> TextBlocks:
    """Fewer than two passes over the rows of a rollout take, of random tokens."""
    torch.manual_seed(4)
    rows = torch.randint(3, 250, (BLOCKS, LENGTH)).tolist()
    return TextBlocks(datasets.Dataset.from_dict({"input_ids": rows}), LENGTH, "key")


def mix_in(distributed: Distributed) -> PTX:
    """This rank's part in them."""
    ranks = {"rank": distributed.rank, "world_size": distributed.world_size}
    return PTX(blocks(), COEFFICIENT, seed=SEED, **ranks)


def gradients_at_steps(actor: nn.Module) -> list[dict[str, torch.Tensor]]:
    """What each step from now on finds, before clipping; the list grows."""
    from deepspeed.utils import safe_get_full_grad

    found, original = [], actor.step

    def step() -> None:
        trained = ((n, p) for n, p in actor.module.named_parameters() if p.requires_grad)
        found.append({n: safe_get_full_grad(p).detach().clone() for n, p in trained})
        original()

    actor.step = step
    return found


def train(
    setting: Setting, e: Experience, folders: Folders, distributed: Distributed, mixed: bool = True
) -> dict:
    """Two epochs on this rank's rows: gradients at each step, weights, figures."""
    roles = setting.load(folders, distributed)
    ptx = mix_in(distributed) if mixed else None
    trainer = ppo_trainer(roles, setting, distributed.world_size, ppo_epochs=2)
    trainer.ptx = ptx
    gradients = gradients_at_steps(roles.actor)
    figures = trainer.train_rlhf([share(e, distributed)])
    return {
        "figures": figures,
        "gradients": gradients,
        "position": ptx.position if mixed else 0,
        "actor": consolidated_state_dict(roles.actor.module, distributed.rank),
    }


def main() -> None:
    """Run every cell."""
    rollout, folder, out = sys.argv[1:]
    distributed = init_distributed()
    folders = Folders(Path(folder) / "actor", Path(folder) / "critic")
    e = Experience(**torch.load(rollout))
    results = {name: train(cell, e, folders, distributed) for name, cell in CELLS.items()}
    if distributed.is_main:
        torch.save(results, out)


if __name__ == "__main__":
    main()
