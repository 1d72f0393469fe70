"""Scores of pairs by a model folder, read with transformers: the same judge for every peer.

    python -m benchmarks.peers.scores reward ./rows.jsonl ./model ./scores.json
    python -m benchmarks.peers.scores dpo ./rows.jsonl ./model ./scores.json

Of a reward model the score is that of a text, its end token included; of a policy the
log-probability of the answer, in nats. Writes [chosen, rejected] of each row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

from benchmarks.peers.task import SIDES

Score = Callable[[list[int], list[int]], float]


def of_reward_model(folder: str) -> Score:
    """Score prompt and answer by a classifier, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, trust_remote_code=False
    ).eval()
    return lambda prompt, answer: model(torch.tensor([prompt + answer])).logits.item()


def of_policy(folder: str) -> Score:
    """Log-probability of an answer to a prompt; the head sees the answer's positions alone."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()

    def score(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer[:-1]])
        logits = model(ids, logits_to_keep=len(answer)).logits[0]  # (|answer|, V)
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).double().sum().item()

    return score


@torch.no_grad()
def main(kind: str, rows: str, folder: str, target: str) -> None:
    """Score every row."""
    score = {"reward": of_reward_model, "dpo": of_policy}[kind](folder)
    found = []
    for row in map(json.loads, Path(rows).read_text(encoding="utf-8").splitlines()):
        found.append([score(row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES])
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(*sys.argv[1:])
