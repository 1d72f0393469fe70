"""One rank of the PPO agreement test: `ppo_worker.py CELL_NUMBERS ROLLOUT FOLDER OUT`.

Every rank trains on its share of one rollout, then samples a rollout of its own whose answers are
of other lengths than its peers'. Rank 0 writes what came of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_roles import LORA, Folders, Setting, end_after, ppo_trainer, prompts

from dschat.rlhf.experience import Experience
from dschat.utils.data.collators import PromptBatch
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict

# Four rows a rank, all of them in one window.
CELLS = {
    "zero 0, full": Setting(micro_batch=1, accumulation=4, ema_decay=0.5),
    "zero 2, lora": Setting(micro_batch=2, accumulation=2, zero_stage=2, lora=LORA, ema_decay=0.5),
    "zero 3, full": Setting(micro_batch=4, zero_stage=3, ema_decay=0.5),
    "zero 3, lora": Setting(
        micro_batch=2,
        accumulation=2,
        zero_stage=3,
        lora=LORA,
        gradient_checkpointing=True,
        ema_decay=0.5,
    ),
}
# Of this rank's own rollout: rank 1 has one prompt, so that one of its rows is filler.
OWN_LENGTHS = {0: [1, 2], 1: [None, 5]}
OWN_PROMPTS = {0: 2, 1: 1}


def share(e: Experience, distributed: Distributed) -> Experience:
    """The rows of this rank."""
    return e.rows(torch.arange(distributed.rank, len(e.scores), distributed.world_size))


def train(setting: Setting, e: Experience, folders: Folders, distributed: Distributed) -> dict:
    """Two epochs on this rank's rows: the weights, the average, the figures."""
    roles = setting.load(folders, distributed)
    trainer = ppo_trainer(roles, setting, distributed.world_size, ppo_epochs=2)
    figures = trainer.train_rlhf([share(e, distributed)])
    rank = distributed.rank
    # The average first: nothing has gathered the weights since the step.
    with roles.ema.applied() as module:
        average = consolidated_state_dict(module, rank)
    result = {
        "figures": figures,
        "average": average,
        "actor": consolidated_state_dict(roles.actor.module, rank),
        "critic": consolidated_state_dict(roles.critic.module, rank),
    }
    if distributed.world_size > 1:
        result["own"] = own_rollout(setting, roles, distributed)
    return result


def own_rollout(setting: Setting, roles, distributed: Distributed) -> dict[str, float]:
    """The figures of an iteration in which no two ranks generate equally long."""
    trainer = ppo_trainer(roles, setting, distributed.world_size, rollout_batch_size=2)
    rank = distributed.rank
    batch = prompts(2, seed=rank)
    count = OWN_PROMPTS[rank]
    batch = PromptBatch(batch.input_ids[:count], batch.attention_mask[:count], batch.real[:count])
    torch.manual_seed(rank)
    hook = end_after(roles.actor.module, OWN_LENGTHS[rank])
    (e,) = trainer.rollout([batch])
    hook.remove()
    return trainer.train_rlhf([e])


def main() -> None:
    """Run the cells asked for."""
    cells, rollout, folder, out = sys.argv[1:]
    distributed = init_distributed()
    folders = Folders(Path(folder) / "actor", Path(folder) / "critic")
    e = Experience(**torch.load(rollout))
    results = {n: train(CELLS[n], e, folders, distributed) for n in cells.split(";")}
    if distributed.is_main:
        torch.save(results, out)


if __name__ == "__main__":
    main()
