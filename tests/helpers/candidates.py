"""Candidates to compare: a language model, a reward model on it, prompts, two files of answers."""

from __future__ import annotations

from pathlib import Path

import torch

from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from tests.helpers.adapters import ALONE
from tests.helpers.steps import write_rows
from tests.helpers.tiny import byte_tokenizer, save_llama_folder

PROMPTS = [f"What is {number}?" for number in range(6)]
SHORT = ["--max_answer_seq_len", "5", "--max_prompt_seq_len", "48", "--dtype", "fp32"]


def make_candidates(folder: Path) -> Path:
    """Write `model`, `reward`, prompts.jsonl, a.jsonl and b.jsonl; one answer of a was cut."""
    tokenizer = byte_tokenizer()
    save_llama_folder(folder / "model", max_position_embeddings=512)
    torch.manual_seed(0)
    reward = create_critic_model(str(folder / "model"), tokenizer, torch.float32, init_head=True)
    save_hf_format(reward, tokenizer, folder / "reward", ALONE)
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    for name, answers in {"a": "so", "b": "no, never"}.items():
        rows = [{"prompt": p, "response": f"{answers}{n}"} for n, p in enumerate(PROMPTS)]
        rows[3]["ended"] = name == "b"
        write_rows(folder / f"{name}.jsonl", rows)
    return folder
