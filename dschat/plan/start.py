"""The plan at the start of a run on a GPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from dschat.train.run_context import RunContext
from dschat.utils.distributed import from_main, print_rank_0

if TYPE_CHECKING:
    from dschat.plan.memory import AnySettings


def tell_plan(ctx: RunContext, settings: AnySettings) -> None:
    """Print what the step needs of the GPU that it runs on; nothing on a CPU, whose memory grows.

    Rank 0 plans for all: they have the same work.

    Raises:
        UserError: on every rank, where the step cannot fit and `ignore_plan` is not given.
    """
    if ctx.device.type != "cuda":
        return
    from dschat.plan.line import line_of  # here: on a CPU nobody needs its seconds

    memory = torch.cuda.get_device_properties(ctx.device).total_memory
    work = partial(line_of, settings, ctx.dtype_name, ctx.world_size, float(memory))
    print_rank_0(from_main(work))
