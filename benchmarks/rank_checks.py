"""Cost of what ranks ask each other in every optimizer step, on two ranks of this machine (gloo).

    python benchmarks/rank_checks.py

Each step sums the loss and the gradients' sums over the ranks before it is made, lest one that is
not finite changes weights (`progress.finite_loss`), and asks whether a signal has reached any rank
(what `Checkpointer.save_if_due` does). They are all-reduces of two numbers and of one, and cost
time, not bandwidth.
Printed are microseconds a call, as rank 0 sees them: the median, and the 10th percentile, which is
what they take while nothing else runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch

from dschat.train.progress import finite_loss
from dschat.utils import rank_watch
from dschat.utils.distributed import all_reduce_max, barrier, init_distributed

RANKS = 2
CHECKS: dict[str, Callable[[], object]] = {
    "is the loss finite": lambda: finite_loss(1, [torch.tensor(2.5)], 8.0),
    "is there a signal": lambda: all_reduce_max([0.0]),
}


def measure(rank: int, port: int, calls: int) -> None:
    """Time the checks on one rank; rank 0 prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    init_distributed()
    for name, check in CHECKS.items():
        for _ in range(calls // 10):
            check()
        barrier()
        seconds, cpu = [], time.process_time()
        for _ in range(calls):
            start = time.perf_counter()
            check()
            seconds.append(time.perf_counter() - start)
        cpu = (time.process_time() - cpu) / calls
        if rank == 0:
            tenth = statistics.quantiles(seconds, n=10)[0]
            figures = (1e6 * x for x in (statistics.median(seconds), tenth, cpu))
            median, tenth, cpu = (f"{x:.0f}" for x in figures)
            print(f"{name}: median {median} us, 10th percentile {tenth} us, CPU {cpu} us")
    rank_watch.stop()


def main() -> None:
    """Start two ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=measure, args=(rank, args.port, args.calls)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


if __name__ == "__main__":
    main()
