"""Tiny inputs, command lines of the steps, and their launch, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launch import TIME_LIMIT, run_ranks
from tests.helpers.tiny import save_llama_folder

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("steps_worker.py")
SFT = "training/step1_supervised_finetuning/main.py"
REWARD = "training/step2_reward_model_finetuning/main.py"
DPO = "training/step2_dpo_finetuning/main.py"
REWARD_EVALUATION = "training/step2_reward_model_finetuning/rw_eval.py"
PROMPT_EVALUATION = "training/step1_supervised_finetuning/prompt_eval.py"
PPO = "training/step3_rlhf_finetuning/main.py"
# Adam divides by |g| + eps: with the 1e-8 of a run the rounding of the smallest gradients becomes
# whole steps, and no bound on the weights of two runs would be of use.
EPS = 1e-3
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Result:
    """Result of one program in the worker."""

    code: int
    stderr: str
    read: list[str]


@dataclass(frozen=True)
class Run:
    """The folder that a launch wrote to, its results in order, and what it printed."""

    folder: Path
    results: list[Result]
    printed: str


def preference_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Sums with a right and a wrong answer, of differing lengths, at most 50 bytes together."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        question = f"\n\nHuman: {a} and {b}?" + " now" * draw.randint(0, 2)
        chosen, rejected = f" {a + b}" + "!" * draw.randint(0, 3), " no" * draw.randint(1, 3)
        prompt = f"{question}\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_optimizer(folder: Path) -> None:
    """`adam.json` for runs whose weights are compared: Adam with EPS."""
    optimizer = {"type": "AdamW", "params": {"eps": EPS, "torch_adam": True}}
    (folder / "adam.json").write_text(json.dumps({"optimizer": optimizer}))


def write_inputs(folder: Path) -> None:
    """A model folder, 67 rows of preferences with 13 more to evaluate on, `adam.json`."""
    write_optimizer(folder)
    save_llama_folder(folder / "model", max_position_embeddings=128)
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", preference_rows(67, seed=0))
    write_rows(folder / "data" / "test.jsonl", preference_rows(13, seed=1))


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(command: Sequence[str], cwd: Path, gpu: bool = False) -> subprocess.CompletedProcess:
    """Run a command without a network, as from a fresh shell; on the CPU unless `gpu`.

    Raises:
        subprocess.TimeoutExpired: after TIME_LIMIT; the command's children are killed too.
    """
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if not gpu:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_worker(
    plan: Sequence[Sequence[object]],
    cwd: Path,
    *,
    ranks: int,
    name: str = "worker",
    torchrun: bool = False,
    gpu: bool = False,
) -> tuple[list[Result], str]:
    """Run programs in turn in one process, or in one a rank.

    Args:
        plan: command lines, the program first; other paths may be relative to `cwd`.
        name: of the folder below `cwd` for the plan and its results, before `-RANKS`.
        torchrun: whether it starts the ranks, lest they start warm.

    Returns:
        A result for each program (rank 0's), and what all of them printed.
    """
    folder = cwd / f"{name}-{ranks}"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps([[str(word) for word in argv] for argv in plan]))
    argv = [str(WORKER), str(folder / "plan.json")]
    if torchrun or gpu:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_port", free_port()]
        done = launch([sys.executable, *(launcher if torchrun else []), *argv], cwd, gpu)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        printed = done.stdout
    else:
        several = ranks if ranks > 1 else None
        printed = "".join(run_ranks(argv[0], several, argv[1:], folder, cwd))
    results = json.loads((folder / "results.json").read_text())
    return [Result(**result) for result in results], printed
