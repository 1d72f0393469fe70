"""A rank of two that kills itself in its first start, where it is the second."""

import os
import signal

from dschat.utils.distributed import all_reduce_sum, barrier, init_distributed

process = init_distributed(60)
barrier()
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"start {start} rank {process.rank} sum {all_reduce_sum([1.0])[0]:g}", flush=True)
if (start, process.rank) == (0, 1):
    os.kill(os.getpid(), signal.SIGKILL)
barrier()
