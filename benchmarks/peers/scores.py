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

Scores = Callable[[list[int], list[list[int]]], list[float]]


def of_reward_model(folder: str) -> Scores:
    """Score the answers to a prompt by a classifier, as it reads one text."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, trust_remote_code=False
    ).eval()

    def scores(prompt: list[int], answers: list[list[int]]) -> list[float]:
        read = model.model(torch.tensor([prompt]), use_cache=True).past_key_values
        found = []
        for answer in answers:
            found.append(model(torch.tensor([answer]), past_key_values=read).logits.item())
            read.crop(-len(answer))
        return found

    return scores


def of_policy(folder: str) -> Scores:
    """Log-probabilities of the answers to a prompt."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()

    def scores(prompt: list[int], answers: list[list[int]]) -> list[float]:
        read = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        found = []
        for answer in answers:
            more = model(torch.tensor([answer]), past_key_values=read.past_key_values)
            read.past_key_values.crop(-len(answer))
            logprobs = torch.cat([read.logits, more.logits[:, :-1]], 1)[0].log_softmax(-1)
            taken = logprobs.gather(1, torch.tensor(answer)[:, None])  # (|answer|, 1)
            found.append(taken.double().sum().item())
        return found

    return scores


@torch.no_grad()
def main(kind: str, rows: str, folder: str, target: str) -> None:
    """Score every row."""
    scores = {"reward": of_reward_model, "dpo": of_policy}[kind](folder)
    found = []
    for row in map(json.loads, Path(rows).read_text(encoding="utf-8").splitlines()):
        found.append(scores(row["prompt_ids"], [row[f"{side}_ids"] for side in SIDES]))
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(*sys.argv[1:])
