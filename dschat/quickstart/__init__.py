"""Embedded default: a small world, a model of random weights, data, a gold rule, a report."""

import json
import random
from pathlib import Path

from dschat.quickstart.model import write_model
from dschat.quickstart.task import LABEL_NOISE, preference_rows, sft_rows, split_prompts

SFT_ROWS, PAIRS, TEST_ROWS = 8000, 6000, 400


def build(output_dir: Path, seed: int) -> None:
    """Write `model/`, `sft/` and `data/` into `output_dir`; the same files for the same seed.

    `sft/` holds supervised rows of mixed quality (prompt, response), `data/` preference pairs
    (prompt, chosen, rejected). No prompt of a test file is in a training file.
    """
    rng = random.Random(seed)
    train, held_out = split_prompts(rng)
    write_model(output_dir / "model", seed)
    _write(output_dir / "sft" / "train.jsonl", sft_rows(rng, train, SFT_ROWS))
    _write(output_dir / "sft" / "test.jsonl", sft_rows(rng, held_out, TEST_ROWS))
    _write(output_dir / "data" / "train.jsonl", preference_rows(rng, train, PAIRS, LABEL_NOISE))
    _write(output_dir / "data" / "test.jsonl", preference_rows(rng, held_out, TEST_ROWS))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
