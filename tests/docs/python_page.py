"""Run every example of docs/python.md in this folder, one after the other, and tell what came."""

import json
import re
import sys
from pathlib import Path

from tests.helpers.steps import preference_rows, write_rows
from tests.helpers.tiny import save_llama_folder


def main(page: Path) -> None:
    """Make model and rows, run the page, write told.json."""
    save_llama_folder(Path("model"), max_position_embeddings=128)
    write_rows(Path("pairs.jsonl"), preference_rows(40, seed=0))
    names: dict = {}
    for example in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
        exec(example, names)
    told = {
        "imported": sorted(sys.modules.keys() & {"dschat.api.steps"}),
        "error": str(names.get("error")),
        "figures": names["run"].figures,
        "train": names["run"].records.train["loss"],
        "kinds": [type(names[name]).__name__ for name in ("model", "tokenizer")],
        "turns": len(names["bot"].turns),
        "rewards": names["rewards"],
        "ppo": [str(names["ppo"].folder), str(names["ppo"].model_folder)],
    }
    Path("told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
