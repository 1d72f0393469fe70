"""One of two ranks: at each ZeRO stage the second one's gradients are nan; print what is said."""

from __future__ import annotations

import torch

from dschat.errors import UserError
from dschat.train.engine import Engine, backward
from dschat.train.progress import finite_loss
from dschat.utils.distributed import init_distributed
from dschat.utils.ds_utils import ZERO_STAGES
from dschat.utils.zero import local_values
from tests.train.collectives_worker import engine_of


def spoil(engine: Engine) -> None:
    """Give one layer's output an infinite slope at the value that it has."""
    layer = engine.module.model.layers[0].self_attn.v_proj
    layer.register_forward_hook(lambda *call: call[2] + (call[2] * 0.0).abs().sqrt() * 0.0)


def said(engine: Engine) -> str:
    """Make the passes of an optimizer step, and check them."""
    losses = []
    for last in (False, True):
        loss = engine(input_ids=torch.arange(3, 35)[None], use_cache=False).logits.mean()
        backward(engine, loss, last)
        losses.append(loss)
    try:
        finite_loss(5, losses, 1.0, engine.gradients)
    except UserError as error:
        return str(error).partition(":")[0].partition(", and ")[2]
    return "nothing"


if __name__ == "__main__":
    peers = init_distributed()
    for stage in ZERO_STAGES:
        engine = engine_of(stage, peers)
        found = [said(engine)]
        engine.step()
        before = [local_values(p).clone() for p in engine.module.parameters()]
        if peers.rank == 1:
            spoil(engine)
        found.append(said(engine))
        after = [local_values(p) for p in engine.module.parameters()]
        same = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        print(f"\nFOUND ZeRO {stage} | {' | '.join(found)} | {same}", flush=True)
        engine.destroy()
