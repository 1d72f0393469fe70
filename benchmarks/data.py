"""Data of step 1: each row tokenised and padded by itself, against the way of the training steps.

    python -m benchmarks.data --data ./hh_rlhf --tokenizer ./opt

DATA is a folder with train.jsonl and test.jsonl (prompt, chosen, rejected); its train rows are
repeated to --rows, each with its own number in the prompt, so that no two are alike. Two ranks of
this machine get them ready and read one epoch, in two ways:

- padded: a call of the tokenizer for each row, padded to --max_len, all rows in one pickle that
  each rank loads whole;
- ours: `create_prompt_dataset`, then rows of like length in batches, batches by tokens, packs.

Printed: speed, disk, memory of each rank, how many slots hold real tokens, and what that means for
the speed of training a small model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from benchmarks.data_training import SEED, batches, print_training_speed, samplers
from dschat.data import datasets as data_utils
from dschat.data.batching import BatchSampler
from dschat.data.config import DataConfig
from dschat.data.datasets import PromptData, create_prompt_dataset
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.waiting import from_local_main

RANKS, BATCH = 2, 16


def write_distinct_rows(source: Path, target: Path, rows: int) -> int:
    """Repeat the train rows of a folder, each with its number; how many bytes of text that is."""
    lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
    target.mkdir(parents=True)
    with (target / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, line in enumerate(itertools.islice(itertools.cycle(lines), rows)):
            row = json.loads(line)
            row["prompt"] = row["prompt"].replace("Human:", f"Human: ({number})", 1)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (target / "test.jsonl").write_bytes((source / "test.jsonl").read_bytes())
    return sum(path.stat().st_size for path in target.iterdir())


def memory(field: str) -> float:
    """A figure of /proc/self/status in MiB: VmHWM, the peak, or RssAnon, what no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def cpu_seconds() -> float:
    """Sum the CPU time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def padded_rank(args: argparse.Namespace, rows: Path, cache: Path, rank: int) -> dict[str, float]:
    """Each row by itself, padded; kept in one pickle."""
    tokenizer, file, speed = load_hf_tokenizer(args.tokenizer), cache / "rows.pt", 0.0
    cpu_speed = 0.0
    start = time.perf_counter()
    if rank == 0:
        cache.mkdir()
        lines = (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [json.loads(line) for line in lines]
        began, cpu = time.perf_counter(), cpu_seconds()
        encoded = [
            tokenizer(
                row["prompt"] + row["chosen"] + tokenizer.eos_token,
                max_length=args.max_len,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            for row in examples
        ]
        speed = len(encoded) / (time.perf_counter() - began)
        cpu_speed = len(encoded) / (cpu_seconds() - cpu)
        masks = [{k: row[k].squeeze(0) for k in ("input_ids", "attention_mask")} for row in encoded]
        torch.save(masks, file)
        del encoded, masks, examples, lines
    dist.barrier()
    loaded = torch.load(file, weights_only=True)
    ready = time.perf_counter() - start
    real = slots = 0
    for row in loaded[rank::RANKS]:
        real, slots = real + int(row["attention_mask"].sum()), slots + row["input_ids"].numel()
    shares = {"padded": real / slots}
    return {
        "speed": speed,
        "cpu_speed": cpu_speed,
        "ready": ready,
        "disk": size_of(cache),
        **usage(),
        **shares,
    }


def our_rank(args: argparse.Namespace, rows: Path, cache: Path, rank: int) -> dict[str, float]:
    """The way of the training steps."""
    tokenizer, spent = load_hf_tokenizer(args.tokenizer), {"rows": 0.0, "wall": 0.0, "cpu": 0.0}
    tokenise = data_utils.tokenise

    def clocked(*arguments: Any) -> Any:
        began, cpu = time.perf_counter(), cpu_seconds()
        result = tokenise(*arguments)
        spent["wall"] += time.perf_counter() - began
        spent["cpu"] += cpu_seconds() - cpu
        spent["rows"] += len(arguments[0])
        return result

    data_utils.tokenise = clocked
    start = time.perf_counter()
    data = our_set(args, rows, cache, tokenizer, from_local_main)
    ready = time.perf_counter() - start
    shares = {
        name: share_of(data.train, sampler, tokenizer, rank)
        for name, sampler in samplers(BATCH, args.max_len).items()
    }
    speed, cpu_speed = (spent["rows"] / max(spent[clock], 1e-9) for clock in ("wall", "cpu"))
    figures = {"speed": speed, "cpu_speed": cpu_speed, "ready": ready, "disk": size_of(cache)}
    return {**figures, **usage(), **shares}


def our_set(
    args: argparse.Namespace,
    rows: Path,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    once: Callable[[Callable[[], str]], str] | None = None,
) -> PromptData:
    """Tokenise all rows for step 1."""
    config = DataConfig(
        data_path=(str(rows),),
        data_split="1",
        data_output_path=str(cache),
        preprocessing_num_workers=args.workers or None,
    )
    return create_prompt_dataset(
        config, tokenizer, 1, seed=SEED, max_seq_len=args.max_len, once=once
    )


def usage() -> dict[str, float]:
    """Memory of this process so far."""
    return {"peak": memory("VmHWM"), "private": memory("RssAnon")}


def share_of(
    rows: Any, sampler: BatchSampler, tokenizer: PreTrainedTokenizerBase, rank: int
) -> float:
    """Real tokens over slots, in an epoch that is read and collated as for training."""
    real = slots = 0
    for batch in batches(rows, sampler, tokenizer.pad_token_id, rank, RANKS):
        real, slots = real + int(batch.attention_mask.sum()), slots + batch.input_ids.numel()
    return real / slots


def rank_process(
    way: Callable[..., dict],
    args: argparse.Namespace,
    rows: Path,
    cache: Path,
    rank: int,
    port: int,
) -> None:
    """One rank; its figures lie beside the cache afterwards."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    method = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    figures = way(args, rows, cache, rank)
    cache.with_suffix(f".{rank}.json").write_text(json.dumps(figures))
    dist.barrier()


def on_ranks(
    way: Callable[..., dict], args: argparse.Namespace, rows: Path, cache: Path
) -> list[dict[str, float]]:
    """The figures of each rank, in processes that have nothing in memory before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=rank_process, args=(way, args, rows, cache, rank, port))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with {process.exitcode}")
    return [json.loads(cache.with_suffix(f".{r}.json").read_text()) for r in range(RANKS)]


def report(name: str, rows: int, text: int, ranks: list[dict[str, float]]) -> None:
    """The figures of one way."""
    first = ranks[0]
    peaks = " and ".join(f"{r['peak']:.0f}" for r in ranks)
    private = " and ".join(f"{r['private']:.0f}" for r in ranks)
    print(
        f"{name:<8} {rows:>6} rows: tokenised at {first['speed']:,.0f} rows/s "
        f"({first['cpu_speed']:,.0f} a CPU second), ready "
        f"after {first['ready']:.1f} s; on disk {first['disk'] / 2**20:,.0f} MiB, "
        f"{first['disk'] / text:.2f} x the text;\n"
        f"{'':<16}peak RSS of the ranks {peaks} MiB, of it at the end private {private} MiB"
    )
    for way in ("padded", *samplers(1, 1)):
        if way in first:
            share = sum(rank[way] for rank in ranks) / len(ranks)
            print(f"{'':<16}{way}: {share:.1%} of the slots are real tokens")


def main() -> None:
    """Run both ways at every size, then train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--workers", type=int, default=0, help="0: as training chooses")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, length {args.max_len}")
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.rows:
            rows = Path(scratch, f"rows-{count}")
            text = write_distinct_rows(args.data, rows, count)
            print(f"\n{count} rows, {text / 2**20:.0f} MiB of text", flush=True)
            found = {}
            for name, way in (("padded", padded_rank), ("ours", our_rank)):
                cache = Path(scratch, f"{name}-{count}")
                found[name] = on_ranks(way, args, rows, cache)
                report(name, count, text, found[name])
            wall, cpu = (
                found["ours"][0][k] / found["padded"][0][k] for k in ("speed", "cpu_speed")
            )
            print(f"tokenising: {wall:.1f} times the rows/s, {cpu:.1f} a CPU second", flush=True)
        tokenizer = load_hf_tokenizer(args.tokenizer)
        data = our_set(args, rows, Path(scratch, f"ours-{count}"), tokenizer).train
        print_training_speed(data, args.max_len, tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
