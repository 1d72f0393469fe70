"""One rank of the rollout test: `rollout_worker.py FOLDER OUT`; each rank writes OUT/RANK.pt.

Ranks have other prompts, other numbers of them and answers of other lengths, so that the output
head runs in other numbers of blocks; only the number of passes is the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dschat.data.batches import PromptBatch
from dschat.models import head_blocks
from dschat.models.causal_lm import create_hf_model
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict
from tests.helpers import tiny
from tests.rlhf.tiny_roles import LORA, Folders, Setting, left_padded, ppo_trainer

CELLS = {
    "zero 3, lora": Setting(zero_stage=3, lora=LORA, gradient_checkpointing=True),
    "zero 3, full": Setting(zero_stage=3),
}
ANSWERS = 2
SMALL_BLOCK = 5 * 4 * tiny.VOCABULARY  # five tokens
LENGTHS = {0: 3, 1: None}  # of every answer on this rank; None runs out of room


def batches(rank: int) -> list[PromptBatch]:
    """Three batches of two prompts; on rank 1 the last one is short."""
    rows = [row[:-1] for row in tiny.token_rows(6, seed=20 + rank)]
    sizes = (2, 2, 2 - rank)
    return [left_padded(rows[2 * i : 2 * i + size]) for i, size in enumerate(sizes)]


def ends_at(module: torch.nn.Module, length: int | None):
    """Make every answer end with its `length`-th token, in each generation anew."""
    steps = []

    def force(_, args, kwargs, output):
        if not kwargs["use_cache"]:
            steps.clear()
            return output
        if kwargs["input_ids"].shape[1] > 1:  # a prompt: a generation begins
            steps.clear()
        steps.append(None)
        output.logits[:, -1, tiny.EOS] = 1e4 if len(steps) == length else -1e4
        return output

    return module.register_forward_hook(force, with_kwargs=True)


def iterate(
    setting: Setting, folders: Folders, distributed: Distributed, block_bytes: int
) -> dict[str, object]:
    """One iteration: what was sampled, and the weights after it."""
    head_blocks.BLOCK_BYTES = block_bytes
    roles = setting.load(folders, distributed)
    trainer = ppo_trainer(
        roles,
        setting,
        distributed.world_size,
        per_device_generation_batch_size=2,
        answers_per_prompt=ANSWERS,
        generation_chunk_size=5,
    )
    torch.manual_seed(distributed.rank)
    hook = ends_at(roles.actor.module, LENGTHS[distributed.rank])
    experiences = trainer.rollout(batches(distributed.rank))
    hook.remove()
    statistics = trainer.train_rlhf(experiences)
    return {
        "experiences": [e.__getstate__() for e in experiences],
        "statistics": statistics,
        "actor": consolidated_state_dict(roles.actor.module, distributed.rank),
    }


@torch.no_grad()
def by_plain_model(folders: Folders, experience: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, A) log-probabilities by the folder's model, whole on this rank, from all its logits."""
    model = create_hf_model(str(folders.actor), tiny.byte_tokenizer(), torch.float32).eval()
    mask, length = experience["attention_mask"], experience["answer_mask"].shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(experience["sequences"], attention_mask=mask, position_ids=positions).logits
    answers = experience["sequences"][:, -length:, None]
    scored = logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, answers).squeeze(-1)
    return scored * mask[:, -length:]


def main() -> None:
    """Every cell in blocks of five tokens and in one block."""
    folder, out = sys.argv[1:]
    distributed = init_distributed()
    folders = Folders(Path(folder) / "actor", Path(folder) / "critic")
    results = {}
    for name, setting in CELLS.items():
        cut = iterate(setting, folders, distributed, SMALL_BLOCK)
        whole = iterate(setting, folders, distributed, 2**26)
        cut["plain"] = [by_plain_model(folders, e) for e in cut["experiences"]]
        results[name] = {"cut": cut, "whole": whole}
    torch.save(results, Path(out) / f"{distributed.rank}.pt")


if __name__ == "__main__":
    main()
