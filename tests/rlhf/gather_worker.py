"""One rank of the test of gathered rollouts: `gather_worker.py FOLDER OUT` writes OUT/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dschat.models.causal_lm import unwrap
from dschat.rlhf.gathered_rollout import GatheredRollout
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from dschat.utils.distributed import Distributed, init_distributed
from dschat.utils.zero import consolidated_state_dict
from tests.rlhf.tiny_roles import LORA, Folders, Setting, ppo_trainer, prompts

SETTING = Setting(zero_stage=3, lora=LORA)
GATHERS = ("all_gather_into_tensor", "all_gather", "_all_gather_base", "broadcast")


def engines(roles) -> dict[str, RolloutEngine]:
    """Layer by layer, and on complete weights by both engines."""
    tokenizer, module = roles.tokenizer, unwrap(roles.actor)
    static = StaticRollout(StaticModel(module), tokenizer, 3)
    return {
        "layers": TransformersRollout(roles.actor, tokenizer, synced_gpus=True),
        "whole": GatheredRollout(TransformersRollout(module, tokenizer), roles.actor),
        "static": GatheredRollout(static, roles.actor),
    }


def run(name: str, folders: Folders, distributed: Distributed) -> dict[str, object]:
    """Greedy answers, collectives that they took, and the weights after an update on others."""
    roles = SETTING.load(folders, distributed)
    trainer, engine = ppo_trainer(roles, SETTING, distributed.world_size), engines(roles)[name]
    roles.eval()
    calls: list[str] = []
    originals = {gather: getattr(dist, gather) for gather in GATHERS if hasattr(dist, gather)}
    for gather, original in originals.items():

        def counted(*args, _original=original, _name=gather, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, gather, counted)
    sampling = SamplingConfig(6, min_answer_seq_len=6 if distributed.rank else 3, greedy=True)
    answers = engine.generate(prompts(seed=distributed.rank), sampling).sequences
    for gather, original in originals.items():
        setattr(dist, gather, original)
    shards = all(p.numel() == 0 or p.ds_persist for p in roles.actor.module.parameters())
    torch.manual_seed(distributed.rank)
    trainer.engine = TransformersRollout(roles.actor, roles.tokenizer, synced_gpus=True)
    trainer.train_rlhf(trainer.rollout([prompts(seed=distributed.rank)]))
    weights = consolidated_state_dict(roles.actor.module, distributed.rank)
    return {"answers": answers, "calls": len(calls), "shards": shards, "weights": weights}


def main() -> None:
    """Each engine on roles of its own."""
    folder, out = sys.argv[1:]
    distributed = init_distributed()
    folders = Folders(Path(folder) / "actor", Path(folder) / "critic")
    results = {name: run(name, folders, distributed) for name in ("layers", "whole", "static")}
    torch.save(results, Path(out) / f"{distributed.rank}.pt")


if __name__ == "__main__":
    main()
