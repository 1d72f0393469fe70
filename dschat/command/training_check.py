"""Short runs of the doctor: the embedded model trains, and GPUs add up a number together."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dschat.report.records import evaluations
from dschat.utils.printable import printable

STEPS = 150  # ten seconds on a core
TIME_LIMIT = 300.0  # seconds, of a slow disk with cold caches
BUILD = """
import pathlib, sys
from dschat.quickstart import build
build(pathlib.Path(sys.argv[1]), seed=1234)
"""
SUM = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
one = torch.ones(1, device="cuda")
dist.all_reduce(one)
assert one.item() == dist.get_world_size(), one.item()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Result:
    """What a short training came to."""

    learned: bool
    text: str


def train() -> Result:
    """Train the embedded model by `dschat sft`, as a user would, and compare the held-out loss."""
    with tempfile.TemporaryDirectory() as folder:
        problem = _run([sys.executable, "-c", BUILD, folder])
        start = time.perf_counter()
        problem = problem or _run([sys.executable, "-m", "dschat", "sft", *_flags(folder)])
        seconds = time.perf_counter() - start
        if problem is not None:
            return Result(False, problem)
        losses = [record["loss"] for record in evaluations(Path(folder, "out"))]
    text = f"{STEPS} steps, held-out loss {losses[0]:.2f} to {losses[-1]:.2f} in {seconds:.0f} s"
    return Result(losses[-1] < losses[0] / 2, text)


def sum_over_gpus(count: int) -> str | None:
    """Add ones over so many GPUs by NCCL; return what went wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "sum.py")
        script.write_text(SUM, encoding="utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return _run([*torchrun, "--nproc_per_node", str(count), str(script)])


def _flags(folder: str) -> list[str]:
    flags = {
        "model_name_or_path": f"{folder}/model",
        "data_path": f"{folder}/sft",
        "data_output_path": f"{folder}/cache",
        "output_dir": f"{folder}/out",
        "max_train_samples": 16 * STEPS,
        "max_eval_samples": 64,
        "max_seq_len": 64,
        "learning_rate": 3e-3,
        "max_steps": STEPS,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _run(command: list[str]) -> str | None:
    """Run a command to its end; return the last line that it says where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return f"no end within {TIME_LIMIT:.0f} s"
    if done.returncode == 0:
        return None
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return printable(said[-1] if said else f"exit code {done.returncode}", keep="")
