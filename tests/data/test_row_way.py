"""What a preference row passes from its file to the batch whose fields the loss reads.

    python -m tests.data.test_row_way

lists it. Counted are the functions of `dschat` that are called, methods and functions within
functions too, from `create_prompt_dataset` with an empty cache to the first batch of step 2; not
lambdas and comprehensions, which are part of the function that they stand in.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import dschat
from dschat.data.batching import build_loader
from dschat.data.collators import RewardCollator
from dschat.data.config import DataConfig
from dschat.data.datasets import create_prompt_dataset
from tests.helpers.tiny import byte_tokenizer

LIBRARY = Path(dschat.__file__).parent
MOST_FILES, MOST_FUNCTIONS = 14, 60


def functions_on_the_way(folder: Path) -> dict[str, list[str]]:
    """Functions called on the way, by the file that holds them, in the order of their calls."""
    called: dict[str, dict[str, None]] = defaultdict(dict)

    def note(frame: FrameType, event: str, arg: Any) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(LIBRARY) and not code.co_name.startswith("<"):
            called[str(path.relative_to(LIBRARY))][code.co_qualname] = None

    rows = [
        {"prompt": f"\n\nHuman: {n}?\n\nAssistant:", "chosen": f" {n}!", "rejected": " No."}
        for n in range(20)
    ]
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(data_path=(str(source),), data_output_path=str(folder / "cache"))
    tokenizer = byte_tokenizer()
    collator = RewardCollator(tokenizer.pad_token_id)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        data = create_prompt_dataset(config, tokenizer, 2, seed=1, max_seq_len=64)
        loader = build_loader(data.train, collator, 4, rank=0, world_size=1, seed=1, shuffle=True)
        batch = next(loader.batches(0))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert len(batch.input_ids) == 8
    return {file: list(names) for file, names in called.items()}


def test_a_row_passes_few_files_and_functions(tmp_path: Path):
    way = functions_on_the_way(tmp_path)
    assert len(way) <= MOST_FILES, sorted(way)
    assert sum(map(len, way.values())) <= MOST_FUNCTIONS, way
    assert {"data/sources.py", "data/tokenise.py", "data/collators.py"} <= way.keys()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = functions_on_the_way(Path(place))
    for file, names in found.items():
        print(f"{file} {len(names)}: {', '.join(names)}")
    print(f"{len(found)} files, {sum(map(len, found.values()))} functions")
