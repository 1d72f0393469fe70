"""One rank of the tests of roles on two: `roles_worker.py FOLDER ONE_BASE ROLLOUT OUT`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from dschat.rlhf.experience import Experience
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict
from tests.rlhf.ppo_worker import share
from tests.rlhf.tiny_roles import LORA, Folders, Setting, ppo_trainer


def one_trunk(stage: int, micro_batch: int = 2) -> Setting:
    """Four rows of two ranks in one window, or of one rank in one micro-batch."""
    return Setting(
        lora=LORA, share_trunk="all", zero_stage=stage, micro_batch=micro_batch, learning_rate=3e-4
    )


def fresh_head(folders: Folders, distributed: Distributed) -> torch.Tensor | None:
    """The head of a critic in shards that starts from the actor's folder."""
    setting = Setting(zero_stage=3)
    critic = replace(setting.role(folders.actor), fresh_head=True)
    roles = setting.load(folders, distributed, critic=critic)
    state = consolidated_state_dict(roles.critic.module, distributed.rank, ["v_head.weight"])
    return state.get("v_head.weight")


def trained(setting: Setting, folders: Folders, distributed: Distributed, e: Experience) -> dict:
    """What two epochs on this rank's rows make of the adapters and the head."""
    roles = setting.load(folders, distributed)
    trainer = ppo_trainer(roles, setting, distributed.world_size, ppo_epochs=2)
    trainer.train_rlhf([share(e, distributed)])
    return {
        f"{role}.{name}": p.detach().clone()
        for role, engine in roles.trained.items()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def main() -> None:
    """Run both, and write what came of them."""
    folder, one_base, rollout, out = map(Path, sys.argv[1:])
    distributed = init_distributed()
    head = fresh_head(Folders(folder / "actor", folder / "critic"), distributed)
    folders = Folders(one_base / "actor", one_base / "critic")
    e = Experience(**torch.load(rollout))
    found = {stage: trained(one_trunk(stage), folders, distributed, e) for stage in (0, 2)}
    if distributed.is_main:
        torch.save({"head": head, **found}, out / "results.pt")


if __name__ == "__main__":
    main()
