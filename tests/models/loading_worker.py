"""One of two ranks: memory of its own that loading a model takes; printed as MiB by rank 0.

Arguments: the model's folder. Pages of the file are all processes' together, and no memory of its
own; so is what has not been written to in a copy of them.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dschat.models.causal_lm import create_hf_model
from dschat.utils.distributed import all_gather, init_distributed
from dschat.utils.ds_utils import EngineConfig, get_train_ds_config


def own_memory() -> float:
    """MiB of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak(threading.Thread):
    """The most that there was meanwhile, by a look every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at = self.peak = own_memory()
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, own_memory())

    def grown(self) -> float:
        self.ended.set()
        self.join()
        return max(self.peak, own_memory()) - self.start_at


def load(stage: int, ranks: int) -> float:
    """Load in the dtype of the file at a ZeRO stage; MiB that this took at its peak."""
    config = EngineConfig(zero_stage=stage, dtype="bf16", micro_batch_size=1)
    peak = Peak()
    model = create_hf_model(
        sys.argv[1], tokenizer, ds_config=get_train_ds_config(config, ranks), dtype=torch.bfloat16
    )
    grown = peak.grown()
    del model
    return grown


if __name__ == "__main__":
    process = init_distributed()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    found = {stage: all_gather(load(stage, process.world_size)) for stage in (0, 3)}
    if process.rank == 0:
        print(f"\nFOUND {json.dumps(found)}", flush=True)
