"""Folders in which the commands of the pages run, one a page: every name that they use is there.

What an earlier command of docs/command.md has made (`MADE`) stands where other pages expect a
trained model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.docs.page_commands import ROOT, Command
from tests.helpers import tiny
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.steps import preference_rows, write_rows

FIRST = "docs/command.md"
OPT = ("facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b")
MODELS = ("my-model", "base", "dpo", "chat-model", *OPT)
CHAT = "Qwen/Qwen3-0.6B"  # has a chat template
ANSWERS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
MADE = {"sft": "output/sft", "ppo": "made/ppo/actor", "reward": "made/reward"}
# What a page expects to be there, by page: a name, and what it is.
EXPECTED: dict[str, dict[str, str]] = {
    "README.md": {"output/step3-models/actor": MADE["ppo"]},
    FIRST: {"output/step3-models/actor": "output/sft", "ppo": "my-model"},
    "docs/adapters.md": {"output/adapter": "output/sft/adapter"},
    "docs/reward_models.md": {"output": MADE["reward"]},
    "docs/ppo/rollout.md": {"output/step1": "my-model", "output/step2": MADE["reward"]},
    "docs/ppo/watching.md": {"output/step3-models": "made/ppo"},
}
SFT = {"model_name_or_path": "./my-model", "data_path": ["./pairs.jsonl"]}
CONFIGS = {
    "sft.yaml": SFT | {"output_dir": "made/other"},
    "reward.yaml": SFT | {"output_dir": MADE["reward"]},
    "ppo.yaml": {
        "actor_model_name_or_path": "./sft",
        "critic_model_name_or_path": "./reward",
        "data_path": ["./pairs.jsonl"],
        "output_dir": "made/ppo",
    },
}
TRACKIO = """
def init(**_): pass
def log(*_, **__): pass
def finish(): pass
"""
READ_ROW = "def read_row(row):\n    return {'prompt': row['prompt'], 'chosen': row['chosen']}\n"


def block(page: str, language: str) -> str:
    """Return the first block of a language on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


def make_shared(folder: Path) -> None:
    """Make what stands in every page's folder."""
    tiny.save_llama_folder(folder / "model", max_position_embeddings=2048)
    shutil.copytree(folder / "model", folder / "chat")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = ANSWERS
    del tokenizer.init_kwargs["prompt_format"]
    tokenizer.save_pretrained(folder / "chat")
    rows = [row | {"answer": row["chosen"]} for row in preference_rows(24, seed=0)]
    for name in ("pairs", "mine", "bench", "gsm8k"):
        write_rows(folder / f"{name}.jsonl", rows)
    for name in ("test", "answers"):
        write_rows(folder / f"{name}.jsonl", rows[:4])
    own = [
        {
            "question": {"full_text": row["prompt"]},
            "answers": [{"text": row["chosen"]}],
            "worst": row["rejected"],
        }
        for row in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(own), folder / "mine.parquet")
    (folder / "my_data.py").write_text(READ_ROW)
    (folder / "my_rewards.py").write_text(block("docs/ppo/rewards.md", "python"))
    (folder / "trackio.py").write_text(TRACKIO)
    (folder / "recipe.yaml").write_text(block(FIRST, "yaml"))
    for name, settings in CONFIGS.items():
        (folder / name).write_text(json.dumps(settings))  # which is YAML


def make(root: Path, page: str) -> Path:
    """Make the folder of a page, with links to what is shared and to what the first page makes."""
    shared, folder, first = root / "shared", root / page, root / FIRST
    if not shared.exists():
        shared.mkdir()
        make_shared(shared)
    folder.mkdir(parents=True)
    links = {name: shared / name for name in shared_names(shared)}
    links |= dict.fromkeys(MODELS, shared / "model") | {CHAT: shared / "chat"}
    links |= {name: ROOT / name for name in ("dschat", "training", "e2e_rlhf.py")}
    links |= {name: first / made for name, made in MADE.items()}
    for name, made in EXPECTED.get(page, {}).items():
        links[name] = shared / "model" if made in MODELS else first / made
    for name, target in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return folder


def shared_names(shared: Path) -> list[str]:
    """List the files that stand in every page's folder."""
    return [path.name for path in shared.iterdir() if path.is_file()]


def run_all(todo: Sequence[Command], root: Path, **variables: str) -> str:
    """Run the commands in the folders of their pages, in one process and its forks.

    Returns:
        What is wrong: each command that failed, with the end of what it said.
    """
    plan: dict[tuple[str, ...], tuple[Command, list[object]]] = {}
    for command in todo:
        if not (folder := root / command.folder).exists():
            make(root, command.folder)
        words = [word.replace("SERVER", variables.get("SERVER", "")) for word in command.words]
        run = [words, str(folder), command.given, str(root / f"{len(plan)}.log")]
        plan.setdefault((command.folder, *words), (command, run))  # once, also if named twice
    (root / "plan.json").write_text(json.dumps([run for _, run in plan.values()]))
    worker = [sys.executable, "-m", "tests.docs.page_worker", str(root / "plan.json")]
    path = f"{ROOT}:{root / 'shared'}"
    env = os.environ | {
        "PYTHONPATH": path,
        "HOME": str(root),
        "XDG_CACHE_HOME": str(root / "cache"),
    }
    subprocess.run(worker, env=env | variables, check=True, timeout=TIME_LIMIT)
    wrong = []
    codes = json.loads((root / "codes.json").read_text())
    for (command, run), code in zip(plan.values(), codes, strict=True):
        said = Path(str(run[-1])).read_text()
        if code != 0 or "Traceback" in said:
            started = f"{command.page}: {command.line}\n{' '.join(command.words)}"
            wrong.append(f"{started}\nexit code {code}\n{said[-1500:]}")
    return "\n\n".join(wrong)
