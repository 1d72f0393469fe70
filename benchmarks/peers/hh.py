"""Reward model and DPO on real preferences by this project and by TRL, side by side.

    python -m benchmarks.peers.hh --model ./smollm2 --data ./hh_rlhf --output ./output

MODEL is a chat model of Llama's kind. DATA holds train.jsonl and test.jsonl (prompt, chosen,
rejected). Both sides train on the same rows in one order and batches, with LoRA of one rank on the
same layers, cosine schedule, fp32, one thread: this project by its recipes, LoRA+ at the default
rates for the model's width; TRL by its trainers, LoRA at the rates that its documentation gives for
adapters. They take turns of a few optimizer steps, so that other load hits both: "times faster" is
the ratio of CPU seconds by turn, smallest / median / largest. Then one program scores the same
held-out pairs with each folder, and each policy answers held-out prompts, greedily, against the
model that training began with, judged by this project's reward model. What a folder has already is
not done again: give another --output for another size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.__main__ import OURS, ROOT, TRL, Worker
from benchmarks.peers.hh_rows import SEED, select, write_ids
from benchmarks.peers.task import Task
from dschat.config import DPOSettings, RewardSettings
from dschat.functional.proportions import wilson_interval
from dschat.models.config import load_config
from dschat.text.tokenizer import load_hf_tokenizer

# The width that default rates are meant for, and TRL's documented rates of adapters.
WIDTHS = {"reward": 1024, "dpo": 2560}
SETTINGS = {"reward": RewardSettings, "dpo": DPOSettings}
TRL_RATES = {"reward": 1e-3, "dpo": 1e-5}


def rates(kind: str, model: str) -> dict[str, str]:
    """Flags of the default rates for the model's width: one over it (docs/dpo.md)."""
    default = SETTINGS[kind](model_name_or_path=model).model.optimizer
    factor = WIDTHS[kind] / load_config(model).get_text_config().hidden_size
    given = {"lora_learning_rate": default.lora_A_rate, "learning_rate": default.base_rate}
    return {name: f"{factor * rate:.2g}" for name, rate in given.items()}


def task_of(kind: str, args: argparse.Namespace, kept: Path, output: Path) -> Task:
    """Describe the training of a kind by this project; TRL's differs in rate and output."""
    flags = {"data_path": str(kept), "data_output_path": str(kept.with_name("cache"))}
    flags |= {"prompt_format": "chat", "seed": str(SEED), "max_eval_samples": "8"}
    task = Task(kind, 0, args.steps, args.turns, 2 * args.batch, args.length, model=args.model)
    return replace(
        task,
        data=str(kept.with_name("ids") / "train.jsonl"),
        output=str(output),
        schedule="cosine",
        warm_up=task.all_steps // 10,
        flags=flags | rates(kind, args.model),
    )


def train(kind: str, args: argparse.Namespace, kept: Path) -> dict[str, list[dict[str, float]]]:
    """Train both sides in turns; the figures of every turn."""
    folders = {peer: args.output / f"{kind}-{peer.lower()}" for peer in (OURS, TRL)}
    target = args.output / f"{kind}-turns.json"
    if target.exists():
        return json.loads(target.read_text())
    tasks = {peer: task_of(kind, args, kept, folder) for peer, folder in folders.items()}
    tasks[TRL] = replace(tasks[TRL], rate=TRL_RATES[kind])
    workers = {peer: Worker(peer, task, args.environments) for peer, task in tasks.items()}
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in workers}
    try:
        for turn in range(args.turns):
            for peer, worker in workers.items():
                found[peer].append(worker.train())
                print(f"{kind} {turn + 1}/{args.turns} {peer}: {found[peer][-1]}", flush=True)
        for worker in workers.values():
            worker.finish()
    finally:
        for worker in workers.values():
            worker.close()
    target.write_text(json.dumps(found))
    return found


def program(module: str, *words: str) -> None:
    """Run a module of this checkout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *words]
    subprocess.run(command, check=True, env=environment | {"CUDA_VISIBLE_DEVICES": ""})


def margins(kind: str, folder: Path, kept: Path) -> list[float]:
    """Score of the chosen answer less that of the rejected one, of every held-out pair."""
    target = kept.with_name("ids") / f"{kind}-{folder.name}.json"
    if not target.exists():
        program(
            "benchmarks.peers.scores",
            kind,
            f"{kept.with_name('ids') / 'test.jsonl'}",
            f"{folder}",
            f"{target}",
        )
    return [chosen - rejected for chosen, rejected in json.loads(target.read_text())]


def held_out(kind: str, args: argparse.Namespace, kept: Path) -> Iterator[str]:
    """Rows of accuracy and margin; of DPO's implicit rewards at beta 0.1."""
    before = [0.0] * args.test if kind == "reward" else margins(kind, Path(args.model), kept)
    for peer in (OURS, TRL):
        found = margins(kind, args.output / f"{kind}-{peer.lower()}", kept)
        scale = 1.0 if kind == "reward" else 0.1
        differences = [scale * (a - b) for a, b in zip(found, before, strict=True)]
        right = sum((d > 0) + 0.5 * (d == 0) for d in differences)
        low, high = wilson_interval(right, len(differences))
        spread = statistics.stdev(differences) / len(differences) ** 0.5
        yield (
            f"| {kind} | {peer} | {right / len(differences):.3f} ({low:.3f} to {high:.3f}) | "
            f"{statistics.mean(differences):.3f} ± {spread:.3f} |"
        )


def speed(kind: str, found: dict[str, list[dict[str, float]]], tokens: int) -> Iterator[str]:
    """Rows of trained tokens a CPU second, by turn; the untimed first step is left out."""
    for peer, figures in found.items():
        rate = tokens / sum(figure["cpu"] for figure in figures)
        ratios = [f["cpu"] / o["cpu"] for f, o in zip(figures, found[OURS], strict=True)]
        times = f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}"
        rss = max(figure["rss"] for figure in figures)
        yield f"| {kind} | {peer} | {rate:.0f} | {rss:.0f} | {'' if peer == OURS else times} |"


def wins(args: argparse.Namespace, kept: Path) -> Iterator[str]:
    """Rows of each policy's wins over the model that training began with."""
    base = args.model
    for peer in (OURS, TRL):
        folder, policy = args.output / f"win-{peer.lower()}", args.output / f"dpo-{peer.lower()}"
        if not (policy / "tokenizer_config.json").exists():  # TRL's folder is the model alone
            load_hf_tokenizer(args.model).save_pretrained(policy)
        if not (folder / "winrate.json").exists():
            words = ["--candidates", str(policy), base, "--prompts", str(kept / "test.jsonl")]
            words += ["--judge", str(args.output / "reward-ours"), "--output_dir", str(folder)]
            words += ["--max_prompts", str(args.prompts), "--max_answer_seq_len", str(args.answer)]
            words += ["--greedy", "--prompt_format", "chat", "--dtype", "fp32"]
            program("dschat.winrate", *words)
        base = str(folder / "answers-2.jsonl")
        figures: dict[str, Any] = json.loads((folder / "winrate.json").read_text())["figures"]
        cells = [with_interval(figures, n) for n in ("win_rate", "length_controlled_win_rate")]
        mine, theirs = figures["tokens"]
        yield f"| {peer} | {cells[0]} | {cells[1]} | {mine:.1f}, {theirs:.1f} |"


def with_interval(figures: dict[str, Any], name: str) -> str:
    """Write a rate with its interval; at equal lengths it may not be known."""
    if figures[name] is None:
        return "not known"
    return f"{figures[name]:.3f} ({figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f})"


def main() -> None:
    """Train, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=["reward", "dpo"])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a turn")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--length", type=int, default=240, help="longest prompt and answer")
    parser.add_argument("--test", type=int, default=200, help="held-out pairs")
    parser.add_argument("--prompts", type=int, default=64, help="that policies answer")
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument(
        "--environments", type=Path, default=Path.home() / ".cache" / "dschat-peers"
    )
    args = parser.parse_args()
    args.model, args.output = str(Path(args.model).resolve()), args.output.resolve()
    args.environments = args.environments.resolve()
    args.environments.mkdir(parents=True, exist_ok=True)
    kept = args.output / "data"
    for folder in (kept, kept.with_name("ids")):
        folder.mkdir(parents=True, exist_ok=True)
    if not (kept.with_name("ids") / "train.jsonl").exists():
        counts = {"train": (args.steps * args.turns + 1) * args.batch, "test": args.test}
        select(args.model, Path(args.data), kept, counts, args.length)
        write_ids(args.model, kept, kept.with_name("ids"), args.batch, args.length)
    rows = (
        (kept.with_name("ids") / "train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[args.batch :]
    )
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in map(json.loads, rows)
    )
    found = {kind: train(kind, args, kept) for kind in args.tasks}
    print(
        "\n| task | | tokens per CPU s | peak RSS, MiB | ours is times faster |\n"
        + 5 * "| --- "
        + "|"
    )
    for kind, turns in found.items():
        print("\n".join(speed(kind, turns, tokens)), flush=True)
    print("\n| task | | accuracy | margin |\n" + 4 * "| --- " + "|")
    for kind in args.tasks:
        print("\n".join(held_out(kind, args, kept)), flush=True)
    if {*args.tasks} == {*SETTINGS}:
        print("\n| | win rate | at equal lengths | tokens of its answers, of base's |")
        print(4 * "| --- " + "|\n" + "\n".join(wins(args, kept)), flush=True)


if __name__ == "__main__":
    main()
