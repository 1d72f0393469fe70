"""Encoding rows never seen before: the word cache against the batched tokenizer.

    python -m benchmarks.data_encoding --data ./hh_rlhf --tokenizers ./opt ./smollm2

DATA is a folder with train.jsonl and test.jsonl (prompt, chosen, rejected). All rows become prompt
and answer ids as step 2 makes them, 1,000 rows at a time: with an empty cache, and with none, where
every text goes through the tokenizer in calls of up to 1,000 texts. The two take turns, so that
whatever else the machine does hits both; figures are medians. Their ids must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dschat.text import word_cache
from dschat.text.encoding import encode, encode_answers
from dschat.text.tokenizer import load_hf_tokenizer

ROUNDS, ROWS_PER_BATCH = 5, 1000


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[list[int]]:
    """Encode the prompts and both answers of all rows."""
    ids = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        prompts = [row["prompt"] for row in batch]
        heads = encode(tokenizer, prompts)
        ids += heads
        for side in ("chosen", "rejected"):
            ids += encode_answers(tokenizer, prompts, heads, [row[side] for row in batch])
    return ids


def compare(name: str, rows: list[dict[str, str]]) -> None:
    """Print wall and CPU seconds of both ways, and their ratios."""
    seconds: dict[str, list[tuple[float, float]]] = {"batched": [], "cached": []}
    ids = {}
    for _ in range(ROUNDS):
        for way, figures in seconds.items():
            tokenizer = load_hf_tokenizer(name)
            if way == "batched":
                word_cache.CACHES[tokenizer] = None
            wall, cpu = time.perf_counter(), time.process_time()
            ids[way] = encoded(tokenizer, rows)
            figures.append((time.perf_counter() - wall, time.process_time() - cpu))
    if ids["batched"] != ids["cached"]:
        raise SystemExit(f"{name}: the two ways give other ids")
    medians = {
        way: [statistics.median(pair) for pair in zip(*figures, strict=True)]
        for way, figures in seconds.items()
    }
    for clock, batched, cached in zip(("wall", "CPU"), *medians.values(), strict=True):
        ratio = batched / cached
        print(f"{name}: {clock} seconds {batched:.2f} batched, {cached:.2f} cached: {ratio:.1f} x")


def main() -> None:
    """Compare for every tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="+", required=True)
    args = parser.parse_args()
    lines = [
        line
        for part in ("train", "test")
        for line in (args.data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [json.loads(line) for line in lines]
    print(f"{len(rows)} rows, {ROUNDS} rounds")
    for name in args.tokenizers:
        compare(name, rows)


if __name__ == "__main__":
    main()
