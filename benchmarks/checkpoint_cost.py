"""Cost of a checkpoint in seconds, bytes and steps, measured in step 1's own program.

    python benchmarks/checkpoint_cost.py --shape embedded
    python benchmarks/checkpoint_cost.py --shape opt-1.3b --steps 4 --save_steps 2

The embedded default trains all weights, OPT-1.3B's shape LoRA of rank 128. Weights are random and
rows made up: neither changes what is written. The first save is apart: it compares what does not
train, once in a run. SHA-256 of every file and fsync are timed apart, by
the clock and as CPU time of the process, which other work on the machine does not change. On one
thread of the CPU; opt-1.3b takes about 12 GB of memory and 8 GB of disk under --folder.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import runpy
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import OPTForCausalLM

from dschat.plan.shapes import config_of
from dschat.quickstart.model import build_tokenizer, corpus, write_model
from dschat.train import checkpoint_folder, checkpointer
from dschat.train.disk import in_words
from dschat.train.progress import TrainingLog

ROOT = Path(__file__).resolve().parents[1]
STEP1 = ROOT / "training/step1_supervised_finetuning/main.py"
SHAPES = {
    "embedded": ["--per_device_train_batch_size", "16", "--max_seq_len", "128"],
    "opt-1.3b": [
        *("--per_device_train_batch_size", "1", "--max_seq_len", "32"),
        *("--lora_dim", "128", "--lora_save", "adapter"),
    ],
}
COMMON = ["--data_split", "10,0,0", "--dtype", "fp32", "--max_eval_samples", "1"]


def write_opt(folder: Path) -> None:
    """OPT-1.3B's shape with random weights in bf16, and the embedded default's tokenizer."""
    torch.set_default_dtype(torch.bfloat16)
    model = OPTForCausalLM(config_of("opt-1.3b"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    build_tokenizer(corpus()).save_pretrained(folder)


def write_rows(path: Path, count: int, length: int) -> None:
    """Rows whose prompt and answer come close to so many tokens."""
    words = " word" * (length // 4)
    rows = ({"prompt": f"Human: {n}{words}\n\nAssistant:", "chosen": words} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Seconds(NamedTuple):
    """Seconds by the clock, and of CPU time."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """This moment, counted from any other."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, other: Seconds) -> Seconds:
        """The time between two moments."""
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    @classmethod
    def median(cls, all_: Sequence[Seconds]) -> Seconds:
        """Median of each."""
        return cls(*map(statistics.median, zip(*all_, strict=True)))

    def __str__(self) -> str:
        return f"{self.wall:.3g} ({self.cpu:.3g})"


class Clock:
    """Time spent in functions, call by call, by a name; moments at which steps ended."""

    def __init__(self, save_steps: int):
        self.save_steps = save_steps
        self.spent: dict[str, list[Seconds]] = defaultdict(list)
        self.moments: list[Seconds] = []

    def time(self, owner: Any, name: str, label: str) -> None:
        """Time every call of `owner.name` from now on."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = Seconds.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[label].append(Seconds.now().since(start))

        setattr(owner, name, timed)

    def steps(self) -> list[Seconds]:
        """Time from the end of a step to that of the next, where no save came between."""
        pairs = enumerate(itertools.pairwise(self.moments), start=1)
        return [two.since(one) for number, (one, two) in pairs if number % self.save_steps]


def watch(save_steps: int) -> Clock:
    """Time steps, saves, and a save's digests and syncs."""
    clock = Clock(save_steps)
    clock.time(checkpointer.Checkpointer, "save", "save")
    clock.time(checkpoint_folder, "digests_of", "digests")
    clock.time(checkpoint_folder, "sync_tree", "fsync")
    log_step = TrainingLog.step

    @functools.wraps(log_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        clock.moments.append(Seconds.now())
        return log_step(*args, **kwargs)

    TrainingLog.step = step
    return clock


def run(argv: list[str]) -> None:
    """Run step 1 in this process."""
    sys.argv = [str(STEP1), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise


def main() -> None:
    """Make the model, run some steps, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/checkpoint_cost"))
    args = parser.parse_args()
    model, output = args.folder / args.shape, args.folder / f"{args.shape}-output"
    args.folder.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        write_opt(model) if args.shape == "opt-1.3b" else write_model(model, seed=0)
    shutil.rmtree(output, ignore_errors=True)
    flags = SHAPES[args.shape]
    write_rows(args.folder / "rows.jsonl", (args.steps + 1) * int(flags[1]) + 2, int(flags[3]))
    torch.set_num_threads(1)
    clock = watch(args.save_steps)
    steps = ["--max_steps", str(args.steps), "--save_steps", str(args.save_steps)]
    paths = ["--model_name_or_path", str(model), "--data_path", str(args.folder / "rows.jsonl")]
    cache = ["--data_output_path", str(args.folder / "cache"), "--output_dir", str(output)]
    run([*paths, *cache, *COMMON, *flags, *steps])
    report(args.shape, clock, output)


def report(shape: str, clock: Clock, output: Path) -> None:
    """Print the figures as a row of a table, with what they were measured on."""
    (checkpoint,) = checkpoint_folder.checkpoints_in(checkpoint_folder.folder_of(output)).values()
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    step = Seconds.median(clock.steps())
    first, *later = clock.spent["save"]
    save, digests, fsync = map(
        Seconds.median, (later, *(clock.spent[n] for n in ("digests", "fsync")))
    )
    shares = Seconds(save.wall / step.wall, save.cpu / step.cpu)
    print(f"{platform.machine()}, {os.cpu_count()} cores; seconds by the clock (of CPU time)")
    heads = ("shape", "step", "checkpoint", "first save", "save", "of it digests", "of it fsync")
    print(f"| {' | '.join(heads)} | save in steps |\n| --- |" + " --- |" * 7)
    cells = (shape, step, in_words(size), first, save, digests, fsync, shares)
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
