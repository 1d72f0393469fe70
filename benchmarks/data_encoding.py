"""Encoding texts never seen before: the word cache against the batched fast tokenizer.

    python -m benchmarks.data_encoding --data ./hh_rlhf --tokenizers ./opt ./smollm2

DATA is a folder with train.jsonl and test.jsonl (prompt, chosen, rejected). Each distinct text is
encoded once, in batches of 1,000: by one call of the tokenizer on the list, and by `encode` with an
empty word cache. The two take turns, so that whatever else the machine does hits both; figures are
medians. Their ids must be equal. TOKENIZERS_PARALLELISM says whether a call uses all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dschat.text.encoding import encode
from dschat.text.tokenizer import load_hf_tokenizer

ROUNDS, TEXTS_PER_BATCH = 5, 1000


def batched(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode a list by one call of the tokenizer, which is asked for ids alone."""
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]


def compare(name: str, texts: list[str]) -> None:
    """Print wall and CPU seconds of both ways, and their ratios."""
    ways = {"batched": batched, "cached": encode}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    ids: dict[str, list[list[int]]] = {}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            tokenizer = load_hf_tokenizer(name)  # a new one comes with an empty cache
            wall, cpu, ids[way] = time.perf_counter(), time.process_time(), []
            for start in range(0, len(texts), TEXTS_PER_BATCH):
                ids[way] += run(tokenizer, texts[start : start + TEXTS_PER_BATCH])
            seconds[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    if ids["batched"] != ids["cached"]:
        raise SystemExit(f"{name}: the two ways give other ids")
    medians = {
        way: [statistics.median(column) for column in zip(*figures, strict=True)]
        for way, figures in seconds.items()
    }
    for clock, slow, fast in zip(("wall", "CPU"), *medians.values(), strict=True):
        print(f"{name}: {clock} seconds {slow:.2f} batched, {fast:.2f} cached: {slow / fast:.2f} x")


def main() -> None:
    """Compare for every tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="+", required=True)
    args = parser.parse_args()
    rows = [
        json.loads(line)
        for part in ("train", "test")
        for line in (args.data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    columns = ("prompt", "chosen", "rejected")
    texts = list(dict.fromkeys(row[column] for row in rows for column in columns))
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters, {ROUNDS} rounds")
    for name in args.tokenizers:
        compare(name, texts)


if __name__ == "__main__":
    main()
