"""PTX: language modelling on plain text, mixed into the actor's steps (Ouyang et al. 2022).

arXiv:2203.02155, eq. 2. Each step of the actor gets, beside PPO's gradient, that of

    coefficient * mean over the step's text tokens, on all ranks, of -log p(token)

with as many blocks of text as the step has rows. Which blocks they are depends on the seed and on
how many were used before, not on micro-batches or on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch

from dschat.data.text_blocks import TextBlocks
from dschat.functional.losses import mean_scale
from dschat.models.logprobs import answer_logprobs
from dschat.train.engine import Engine, backward
from dschat.utils.distributed import all_reduce_sum


class BlockOrder:
    """Endless order of blocks: each pass over all of them in an order drawn from the seed."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._drawn: tuple[int, np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        """Block at a place of the endless order."""
        epoch, place = divmod(position, self.count)
        if self._drawn is None or self._drawn[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._drawn = epoch, order
        return int(self._drawn[1][place])


class PTX:
    """Language modelling of the actor beside PPO; its state is the place in the blocks."""

    per_rank = False  # ranks take turns within one row of blocks

    def __init__(
        self, text: TextBlocks, coefficient: float, *, seed: int, rank: int, world_size: int
    ):
        self.coefficient, self.rank, self.world_size = coefficient, rank, world_size
        self.rows: datasets.Dataset = text.blocks.with_format("numpy")
        self.length = text.length
        self.order = BlockOrder(len(text.blocks), seed)
        self.position = 0
        self._loss = self._tokens = 0.0

    def state_dict(self) -> dict[str, int]:
        """Number of blocks used up."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the place in the blocks."""
        self.position = state["position"]

    def backward(self, actor: Engine, rows: Sequence[int]) -> None:
        """Add the gradient of one actor step, before the last backward pass of its group.

        Args:
            rows: of each micro-batch of the accumulation group; the same on every rank.
        """
        blocks = self.world_size * sum(rows)
        first = self.position + self.rank
        mine = [self.order[i] for i in range(first, self.position + blocks, self.world_size)]
        self.position += blocks
        scale = self.coefficient * mean_scale(blocks * (self.length - 1), self.world_size)
        for count in rows:
            chunk, mine = mine[:count], mine[count:]
            ids = torch.from_numpy(np.stack(self.rows[chunk]["input_ids"]).astype(np.int64))
            ids = ids.to(actor.device)
            everything = torch.ones_like(ids, dtype=torch.bool)
            loss = -answer_logprobs(actor, ids, everything, self.length - 1).logprobs.sum()
            backward(actor, loss * scale, last=False)
            self._loss += loss.item()
            self._tokens += count * (self.length - 1)

    def statistics(self) -> dict[str, float]:
        """Nats per token since the last call, over all ranks; empty where no step was made."""
        loss, tokens = all_reduce_sum([self._loss, self._tokens])
        self._loss = self._tokens = 0.0
        return {"ptx_loss": loss / tokens} if tokens else {}
