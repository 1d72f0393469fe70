"""The rows of `benchmarks.peers.hh`: real preferences that fit whole, as text and as tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.peers.task import SIDES
from dschat.data.batching import build_loader
from dschat.data.config import DataConfig
from dschat.data.datasets import create_prompt_dataset
from dschat.text.formats import set_format
from dschat.text.tokenizer import load_hf_tokenizer

SEED = 1234
TEMPLATE = 40  # tokens that a chat template may add to a prompt


def select(model: str, data: Path, kept: Path, counts: dict[str, int], length: int) -> None:
    """Write `train.jsonl` and `test.jsonl` of the rows that are used: fitting ones, at random.

    Args:
        counts: rows of each part. length: tokens of the longest prompt and answer together.
    """
    encode = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    for name, count in counts.items():
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
        fit = []
        for row in rows:
            texts = [row["prompt"] + row[side] for side in SIDES]
            longest = max(map(len, encode(texts).input_ids))
            if longest + TEMPLATE <= length and row["chosen"] != row["rejected"]:
                fit.append({key: row[key] for key in ("prompt", *SIDES)})
        if len(fit) < count:
            raise SystemExit(f"{name}.jsonl: {len(fit)} rows fit, {count} are asked for")
        chosen = random.Random(SEED).sample(fit, count)
        (kept / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


def write_ids(model: str, kept: Path, ids: Path, batch: int, length: int) -> None:
    """Write the tokens of both parts, those of training in the order of the recipes' batches."""
    tokenizer = load_hf_tokenizer(model)
    set_format(tokenizer, "chat")
    config = DataConfig(data_path=(str(kept),), data_output_path=str(kept.with_name("cache")))
    data = create_prompt_dataset(config, tokenizer, 2, seed=SEED, max_seq_len=length)
    training = build_loader(data.train, list, batch, rank=0, world_size=1, seed=SEED, shuffle=True)
    training.set_epoch(0)
    ordered = [row for rows in training for row in rows]
    for name, rows in (("train", ordered), ("test", data.eval)):
        lines = []
        for row in rows:
            start = row["prompt_len"]
            tokens = {"prompt_ids": row["chosen_ids"][:start]}
            tokens |= {f"{side}_ids": row[f"{side}_ids"][start:] for side in SIDES}
            lines.append(json.dumps(tokens) + "\n")
        (ids / f"{name}.jsonl").write_text("".join(lines))
    print("\n".join(data.report.lines()), flush=True)
