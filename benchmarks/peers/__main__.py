"""The same training by this project, by transformers' Trainer with PEFT, and by TRL, side by side.

    python -m benchmarks.peers
    python -m benchmarks.peers --tasks sft --vocabularies 4096 --rounds 7

One model, one order of rows, batches of the same rows, fp32, one thread, LoRA of rank 16 on every
linear layer. A cell is a task at a vocabulary: its peers live side by side in processes of their
own and take turns, so that whatever else the machine does hits all of them. Seconds are those of
the optimizer steps after the first, medians of the rounds; "times faster" is the median of the
rounds' ratios of CPU seconds, with the smallest and largest beside it. All peers must begin with
one loss. Each peer's environment is made on the first call: its own packages, over the packages of
the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers.task import RESULT, Task

ROOT = Path(__file__).resolve().parents[2]
PEERS = {
    "ours": ("benchmarks.peers.ours", ()),
    "transformers + PEFT": ("benchmarks.peers.trainers", ("plain",)),
    "TRL": ("benchmarks.peers.trainers", ("trl",)),
}
PACKAGES = {"transformers + PEFT": ("peft", "accelerate"), "TRL": ("trl", "peft", "accelerate")}


def interpreter(peer: str, folder: Path) -> str:
    """Return a peer's interpreter; its environment is made unless it is there."""
    if peer not in PACKAGES:
        return sys.executable
    home = folder / peer.split()[0].lower()
    python = home / "bin" / "python"
    if not python.exists():
        print(f"making {home} for {peer}: {', '.join(PACKAGES[peer])}", file=sys.stderr)
        venv.create(home, with_pip=False)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "base.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
        install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([sys.executable, "-m", *install, *PACKAGES[peer]], check=True)
    return str(python)


class Worker:
    """A peer's process, which trains a task whenever it is told to."""

    def __init__(self, peer: str, task: Task, folder: Path):
        module, words = PEERS[peer]
        command = [interpreter(peer, folder), "-m", module, json.dumps(asdict(task)), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def train(self) -> dict[str, float]:
        """Have it train once; its figures.

        Raises:
            RuntimeError: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def table(task: Task, rounds: int, folder: Path) -> list[str]:
    """Rows of one cell."""
    workers = {peer: Worker(peer, task, folder) for peer in PEERS}
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    try:
        for _ in range(rounds):
            for peer, worker in workers.items():
                found[peer].append(worker.train())
    finally:
        for worker in workers.values():
            worker.close()
    losses = {peer: figures[0]["loss"] for peer, figures in found.items()}
    if max(losses.values()) - min(losses.values()) > 2e-3:
        raise SystemExit(f"{task.kind}: the peers do not begin with one loss: {losses}")
    lines = []
    for peer, figures in found.items():
        cpu, wall, rss = (statistics.median(f[n] for f in figures) for n in ("cpu", "wall", "rss"))
        ratios = [f["cpu"] / o["cpu"] for f, o in zip(figures, found["ours"], strict=True)]
        times = f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}"
        lines.append(
            f"| {task.kind} | {task.vocabulary} | {peer} | {cpu:.2f} | {wall:.2f} | {rss:.0f} | "
            f"{'' if peer == 'ours' else times} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["sft", "reward"])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[4096, 50272])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps of a turn")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--environments", type=Path, default=Path.home() / ".cache" / "dschat-peers"
    )
    args = parser.parse_args()
    print("| task | vocabulary | | CPU s | wall s | peak RSS, MiB | ours is times faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for kind in args.tasks:
        for vocabulary in args.vocabularies:
            task = Task(kind, vocabulary, args.steps, args.batch, args.length)
            print("\n".join(table(task, args.rounds, args.environments)), flush=True)


if __name__ == "__main__":
    main()
