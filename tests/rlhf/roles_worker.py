"""One rank of the test of fresh heads: `roles_worker.py FOLDER OUT`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_roles import Folders, Setting

from dschat.utils.distributed import init_distributed
from dschat.utils.zero import consolidated_state_dict


def main() -> None:
    """Load a critic with a fresh head in shards, and write the head."""
    folder, out = map(Path, sys.argv[1:])
    distributed = init_distributed()
    folders = Folders(folder / "actor", folder / "critic")
    setting = Setting(zero_stage=3)
    critic = replace(setting.role(folders.actor), fresh_head=True)
    roles = setting.load(folders, distributed, critic=critic)
    state = consolidated_state_dict(roles.critic.module, distributed.rank, ["v_head.weight"])
    if distributed.is_main:
        torch.save(state["v_head.weight"], out / "head.pt")


if __name__ == "__main__":
    main()
