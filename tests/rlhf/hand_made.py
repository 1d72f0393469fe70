"""A rollout whose texts and numbers are written down, for tests of what is made of rollouts."""

from __future__ import annotations

import torch

from dschat.rlhf.experience import Experience
from tests.helpers.tiny import BOS, EOS, PAD, byte_tokenizer


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def sampled() -> Experience:
    """ "q: b" -> "yes" with its end, "q" -> "no" cut off in the middle, and a filler row."""
    question, short, yes, no = ids("q: b"), ids("q"), ids("yes"), ids("no!!")
    rows = [
        [BOS, *question, *yes, EOS],
        [PAD, PAD, PAD, BOS, *short, *no],
        [PAD, PAD, PAD, BOS, *short, *no],
    ]
    sequences = torch.tensor(rows)
    real = torch.tensor([True, True, False])
    attention = sequences != PAD
    zeros = torch.zeros(3, 4)
    return Experience(
        sequences=sequences,
        attention_mask=attention,
        answer_mask=torch.ones(3, 4, dtype=torch.bool) & real[:, None],
        ended=torch.tensor([True, False, False]),
        real=real,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        model_scores=torch.tensor([3.0, -1.0, 50.0]),
        group=torch.arange(3),
    )
