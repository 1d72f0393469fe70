"""Seconds that it takes to tokenise rows, and to open and verify the set that is kept of them.

    python -m benchmarks.data_cache --tokenizer ./model --rows 50000

Leaves out: a disk that is cold. The files have just been written.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from dschat.data.cache import damage_of
from dschat.data.config import SFTDataConfig
from dschat.data.datasets import create_prompt_dataset
from dschat.text.tokenizer import load_hf_tokenizer

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "went", "away", "to", "see", "it")


def write_rows(path: Path, count: int) -> None:
    """Write rows of about 90 words."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt, chosen = (" ".join(draw.choices(WORDS, k=k)) for k in (30, 60))
            row = {"prompt": f"{number} {prompt}", "chosen": f" {chosen}", "rejected": " no"}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Print a line for each of three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--rows", type=int, default=50_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), load_hf_tokenizer(args.tokenizer)
        write_rows(folder / "rows.jsonl", args.rows)
        source = (str(folder / "rows.jsonl"),)
        config = SFTDataConfig(data_path=source, data_output_path=str(folder / "cache"))
        for label in ("tokenise", "open"):
            start = time.perf_counter()
            create_prompt_dataset(config, tokenizer, 1, seed=1, max_seq_len=512)
            print(f"{label}: {time.perf_counter() - start:.2f} s")
        sets = [record.parent for record in (folder / "cache").rglob("digests.json")]
        size = sum(file.stat().st_size for kept in sets for file in kept.iterdir())
        start = time.perf_counter()
        assert [damage_of(kept) for kept in sets] == [None] * len(sets)
        print(f"of that verify: {time.perf_counter() - start:.2f} s, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
