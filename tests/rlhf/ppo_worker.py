"""One rank of the PPO agreement test: `ppo_worker.py CELL_NUMBERS ROLLOUT FOLDER OUT`.

Every rank trains on its share of one rollout, then samples a rollout of its own whose answers are
of other lengths than its peers'. Rank 0 writes what came of it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from dschat.data.batches import PromptBatch
from dschat.rlhf.experience import Experience
from dschat.rlhf.part_config import EMAConfig
from dschat.rlhf.policy_config import PolicyConfig
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict
from tests.rlhf.tiny_roles import (
    LORA,
    Folders,
    Setting,
    end_after,
    ppo_trainer,
    prompts,
    without_critic,
)

EMA = EMAConfig(enable_ema=True, ema_decay=0.5)
# Four rows a rank, all of them in one window.
CELLS = {
    "zero 0, full": Setting(micro_batch=1, accumulation=4, ema=EMA),
    "zero 2, lora": Setting(micro_batch=2, accumulation=2, zero_stage=2, lora=LORA, ema=EMA),
    "zero 3, full": Setting(micro_batch=4, zero_stage=3, ema=EMA),
    "zero 3, lora": Setting(
        micro_batch=2,
        accumulation=2,
        zero_stage=3,
        lora=LORA,
        gradient_checkpointing=True,
        ema=EMA,
    ),
    "zero 0, pairs": Setting(micro_batch=2, accumulation=2, ema=EMA),
    "zero 2, pairs": Setting(micro_batch=1, accumulation=4, zero_stage=2, ema=EMA),
    "zero 3, pairs": Setting(micro_batch=4, zero_stage=3, ema=EMA),
    "zero 2, knobs": Setting(micro_batch=1, accumulation=4, zero_stage=2, ema=EMA),
    "zero 0, knobs": Setting(micro_batch=2, accumulation=2, ema=EMA),
    "zero 3, held": Setting(micro_batch=2, accumulation=2, zero_stage=3, lora=LORA, ema=EMA),
    "zero 2, short": Setting(micro_batch=1, accumulation=2, zero_stage=2, ema=EMA),
}
EPOCHS = 2  # of one step each
RLOO = {"advantage_estimator": "rloo", "answers_per_prompt": 2, "kl_estimator": "k3"}
GRPO = {"advantage_estimator": "grpo", "answers_per_prompt": 2, "kl_coef": 0.5}
CHANGES = {
    "zero 0, pairs": RLOO,
    "zero 2, pairs": GRPO,
    "zero 3, pairs": RLOO,
    # Two answers are cut, one has no score.
    "zero 2, knobs": {
        **GRPO,
        "unscored": 4,
        "policy": PolicyConfig(
            cliprange_high=0.3,
            loss_aggregation="constant",
            advantage_std="none",
            mask_truncated_answers=True,
        ),
    },
    "zero 0, knobs": {
        **RLOO,
        "policy": PolicyConfig(loss_aggregation="answer", importance_level="sequence"),
    },
    # After two steps the ranks' own distances are 1.97 and 1.32, that of all tokens is 1.60.
    "zero 3, held": {"update_kl_limit": 1.45, "ppo_epochs": 4, "kl_target": 1.0},
    # Two rows on one rank, one on the other: the second of two groups is empty on both.
    "zero 2, short": {"real": 3},
}
# A prompt's answers are on one rank; groups of 2, 2 and 3, and the row of filler alone.
GROUP = torch.tensor([0, 2, 0, 2, 1, 2, 1, 3])
# Of this rank's own rollout: rank 1 has one prompt, so that one of its rows is filler.
OWN_LENGTHS = {0: [1, 2], 1: [None, 5]}
OWN_PROMPTS = {0: 2, 1: 1}


def share(e: Experience, distributed: Distributed) -> Experience:
    """The rows of this rank."""
    return e.rows(torch.arange(distributed.rank, len(e), distributed.world_size))


def train(
    setting: Setting, e: Experience, folders: Folders, distributed: Distributed, **changes: object
) -> dict:
    """Two epochs, or as changed, on this rank's rows: the weights, the average, the figures."""
    roles = setting.load(folders, distributed)
    real = torch.arange(len(e)) < changes.pop("real", len(e))
    e = dataclasses.replace(e, real=e.real & real, answer_mask=e.answer_mask & real[:, None])
    if "unscored" in changes:
        e = dataclasses.replace(e, scored=torch.arange(len(e)) != changes.pop("unscored"))
    pairs = "answers_per_prompt" in changes
    if pairs:
        roles = without_critic(roles)
        e = dataclasses.replace(e, group=GROUP, values=None)
    trainer = ppo_trainer(
        roles, setting, distributed.world_size, **{"ppo_epochs": EPOCHS, **changes}
    )
    figures = trainer.train_rlhf([share(e, distributed)])
    rank = distributed.rank
    # The average first: nothing has gathered the weights since the step.
    with roles.ema.applied() as module:
        average = consolidated_state_dict(module, rank)
    result = {
        "figures": figures,
        "kl_coefficient": trainer.kl.coefficient,
        "average": average,
        "actor": consolidated_state_dict(roles.actor.module, rank),
    }
    if not pairs:
        result["critic"] = consolidated_state_dict(roles.critic.module, rank)
        if distributed.world_size > 1:
            result["own"] = own_rollout(setting, roles, distributed)
    return result


def own_rollout(setting: Setting, roles, distributed: Distributed) -> dict[str, float]:
    """The figures of an iteration in which no two ranks generate equally long."""
    trainer = ppo_trainer(
        roles, setting, distributed.world_size, per_device_generation_batch_size=2
    )
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
    results = {
        n: train(CELLS[n], e, folders, distributed, **CHANGES.get(n, {})) for n in cells.split(";")
    }
    if distributed.is_main:
        torch.save(results, out)


if __name__ == "__main__":
    main()
