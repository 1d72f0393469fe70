"""The same training by this project, by transformers' Trainer with PEFT, and by TRL, side by side.

    python -m benchmarks.peers
    python -m benchmarks.peers --tasks sft dpo --vocabularies 4096 --rounds 7
    python -m benchmarks.peers --tasks ppo --batch 32 --length 64 --steps 1
    python -m benchmarks.peers --tasks reward dpo --model ./smollm2 --data ./hh_rlhf/train.jsonl

One model, one order of rows, batches of the same rows, fp32, one thread, LoRA of rank 16 on every
linear layer. A cell is a task at a vocabulary: its peers live side by side in processes of their
own and take turns, so that whatever else the machine does hits all of them. Seconds are those of
the optimizer steps of a turn, medians of the rounds; "times faster" is the median of the rounds'
ratios of CPU seconds, with the smallest and largest beside it. Where losses can be compared, all
peers must begin with one. In grpo, rloo and ppo a step is an iteration of the real recipe: as many
answers as `--batch`, of one length; ppo's peer is this project at commit 1ef78d1, with the same
flags. Each peer's environment is made on the first call: its own packages, over the packages of
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
BASE = "1ef78d1"  # the commit that step 3 is compared with
OURS, PLAIN, TRL = "ours", "transformers + PEFT", "TRL"
PEERS = {
    "sft": (OURS, PLAIN, TRL),
    "reward": (OURS, PLAIN, TRL),
    "dpo": (OURS, TRL),
    "grpo": (OURS, TRL),
    "rloo": (OURS, TRL),
    "ppo": (OURS, BASE),
}
PACKAGES = {PLAIN: ("peft", "accelerate"), TRL: ("trl", "peft", "accelerate")}


def program(peer: str, task: Task) -> tuple[str, ...]:
    """Name the module that trains a task, and its words."""
    if peer in PACKAGES:
        return "benchmarks.peers.trainers", "plain" if peer == PLAIN else "trl"
    as_run = task.output or task.kind in ("grpo", "rloo", "ppo")
    return ("benchmarks.peers.recipe" if as_run else "benchmarks.peers.ours",)


def tree_of(peer: str, folder: Path) -> Path:
    """Return the tree whose library a peer takes; that of an earlier commit is made."""
    if peer != BASE:
        return ROOT
    tree = folder / BASE
    if not tree.exists():
        tree.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", BASE], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", str(tree)], check=True, input=archive.stdout)
    return tree


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
    """A peer's process, which goes on with its task whenever it is told to."""

    def __init__(self, peer: str, task: Task, folder: Path):
        module, *words = program(peer, task)
        command = [interpreter(peer, folder), "-m", module, json.dumps(asdict(task)), *words]
        trees = dict.fromkeys(map(str, (tree_of(peer, folder), ROOT)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(trees), "CUDA_VISIBLE_DEVICES": ""}
        self.log = folder / f"{task.kind}-{peer.split()[0]}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=environment,
            )

    def train(self) -> dict[str, float]:
        """Have it take its turn; its figures.

        Raises:
            RuntimeError: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}, see {self.log}")

    def finish(self) -> None:
        """Have it do what follows its last turn.

        Raises:
            RuntimeError: it fails.
        """
        self.process.communicate("\n")
        if self.process.returncode:
            raise RuntimeError(f"{self.process.args}: ended badly, see {self.log}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def table(task: Task, folder: Path) -> list[str]:
    """Rows of one cell."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = {peer: Worker(peer, task, folder) for peer in PEERS[task.kind]}
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in workers}
    try:
        for _ in range(task.turns):
            for peer, worker in workers.items():
                found[peer].append(worker.train())
    finally:
        for worker in workers.values():
            worker.close()
    if task.kind in ("sft", "reward", "dpo"):
        losses = {peer: figures[0]["loss"] for peer, figures in found.items()}
        if max(losses.values()) - min(losses.values()) > 2e-3:
            raise SystemExit(f"{task.kind}: the peers do not begin with one loss: {losses}")
    lines, name = [], Path(task.model).name or task.vocabulary
    for peer, figures in found.items():
        cpu, wall, rss = (statistics.median(f[n] for f in figures) for n in ("cpu", "wall", "rss"))
        ratios = [f["cpu"] / o["cpu"] for f, o in zip(figures, found[OURS], strict=True)]
        times = f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}"
        lines.append(
            f"| {task.kind} | {name} | {peer} | {cpu:.2f} | {wall:.2f} | {rss:.0f} | "
            f"{'' if peer == OURS else times} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[4096, 50272])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a turn")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256, help="of the model, in eights")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--updates", type=int, default=1, help="of the policy, a batch of answers")
    parser.add_argument("--model", default="", help="folder of a Llama; with --data")
    parser.add_argument("--data", default="", help="file of prompt, chosen, rejected")
    parser.add_argument(
        "--environments", type=Path, default=Path.home() / ".cache" / "dschat-peers"
    )
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if args.model:
        args.model, args.data = (str(Path(path).resolve()) for path in (args.model, args.data))
        args.vocabularies = [0]  # the model's own
        if not {*args.tasks} <= {"sft", "reward", "dpo"}:
            parser.error("--model is for --tasks sft, reward and dpo")
    print("| task | vocabulary | | CPU s | wall s | peak RSS, MiB | ours is times faster |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for kind in args.tasks:
        for vocabulary in args.vocabularies:
            size = args.steps, args.rounds, args.batch, args.length, args.width, args.layers
            named = {"updates": args.updates, "model": args.model, "data": args.data}
            task = Task(kind, vocabulary, *size, **named)
            print("\n".join(table(task, args.environments.resolve())), flush=True)


if __name__ == "__main__":
    main()
