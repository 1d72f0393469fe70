"""The rows of `benchmarks.peers.hh`: real preferences that fit whole, as text and as tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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

    Where the test part has too few, rows of the training part are held out, with other prompts than
    those that train.

    Args:
        counts: rows of each part. length: tokens of the longest prompt and answer together.
    """
    encode = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    train = _fitting(data / "train.jsonl", encode, length)
    kept_rows = {"train": train[: counts["train"]]}
    prompts = {row["prompt"] for row in kept_rows["train"]}
    others = [row for row in train[counts["train"] :] if row["prompt"] not in prompts]
    kept_rows["test"] = (_fitting(data / "test.jsonl", encode, length) + others)[: counts["test"]]
    for name, rows in kept_rows.items():
        if len(rows) < counts[name]:
            raise SystemExit(f"{name}: {len(rows)} rows fit, {counts[name]} are asked for")
        (kept / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _fitting(file: Path, encode: PreTrainedTokenizerBase, length: int) -> list[dict[str, str]]:
    """Read the pairs that fit, in an order drawn at random."""
    fit = []
    for row in map(json.loads, file.open(encoding="utf-8")):
        longest = max(map(len, encode([row["prompt"] + row[side] for side in SIDES]).input_ids))
        if longest + TEMPLATE <= length and row["chosen"] != row["rejected"]:
            fit.append({key: row[key] for key in ("prompt", *SIDES)})
    return random.Random(SEED).sample(fit, len(fit))


def write_ids(model: str, kept: Path, ids: Path, batch: int, length: int) -> None:
    """Write the tokens of both parts, those of training in the order of the recipes' batches."""
    tokenizer = load_hf_tokenizer(model)
    set_format(tokenizer, "chat")
    config = DataConfig(data_path=(str(kept),), data_output_path=str(kept.with_name("cache")))
    data = create_prompt_dataset(config, tokenizer, 2, seed=SEED, max_seq_len=length)
    training = build_loader(data.train, list, batch, rank=0, world_size=1, seed=SEED, shuffle=True)
    ordered = [row for rows in training.batches(0) for row in rows]
    for name, rows in (("train", ordered), ("test", data.eval)):
        lines = []
        for row in rows:
            start = row["prompt_len"]
            tokens = {"prompt_ids": row["chosen_ids"][:start]}
            tokens |= {f"{side}_ids": row[f"{side}_ids"][start:] for side in SIDES}
            lines.append(json.dumps(tokens) + "\n")
        (ids / f"{name}.jsonl").write_text("".join(lines))
    print("\n".join(data.report.lines()), flush=True)
