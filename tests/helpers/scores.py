"""Texts of differing lengths and their scores: alone, in every padding, by the folder's note."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from dschat.data.collators import PairCollator
from dschat.models.reward_model import scores_at_end
from dschat.train.answer_scores import score_answers
from dschat.train.evaluation import pair_scores
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS

# The shortest is shorter than the windows of the tiny models, the others longer.
TEXTS = [
    "Hi.",
    "Say hello. Hello!",
    "Count. One, two, three, four, five",
    "What? No",
    "A",
    "Why? So",
]
ROWS = [[*tiny.byte_tokenizer()(text).input_ids, tiny.EOS] for text in TEXTS]
PADDINGS = {"none": (0, 0), "right": (0, 1), "left": (1, 0), "wide": (0, 3), "both": (5, 2)}


@torch.no_grad()
def scores_alone(model: nn.Module, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """(N,): the value at each row's last position, nothing beside it."""
    one = [torch.tensor([row]) for row in rows]
    return torch.stack([model(ids, torch.ones_like(ids).bool())[0, -1] for ids in one])


def padded(name: str, fill: int = tiny.PAD) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of all rows, (B, T) ids and bool mask, padded on one side, wider, or on both."""
    if name == "none":
        return [(torch.tensor([row]), torch.ones(1, len(row)).bool()) for row in ROWS]
    left, right = PADDINGS[name]
    width = max(map(len, ROWS)) + left + right
    ids = torch.full((len(ROWS), width), fill)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        spare = width - len(row)
        start = spare if right == 0 else left
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return [(ids, mask)]


@torch.no_grad()
def padded_scores(model: nn.Module, name: str) -> torch.Tensor:
    """(N,): by the mask, whatever stands under the padding."""
    parts = padded(name, fill=7)
    return torch.cat([scores_at_end(model(ids, mask), mask) for ids, mask in parts])


@torch.no_grad()
def all_ways(model: nn.Module) -> torch.Tensor:
    """(ways, N): in every padding, and as the programs compute them, of pairs and of answers."""
    rows = [{"input_ids": row, "trained": [0, len(row)], "length": len(row)} for row in ROWS]
    pairs = [
        {"chosen_ids": a, "rejected_ids": b, "prompt_len": 1}
        for a, b in zip(ROWS[::2], ROWS[1::2], strict=True)
    ]
    of_pairs = torch.stack(pair_scores(model, PairCollator(tiny.PAD)(pairs)), -1).flatten()
    device = torch.device("cpu")
    of_answers = [score_answers(model, rows, tiny.PAD, device, size).float() for size in (1, 3)]
    ways = [*(padded_scores(model, name) for name in PADDINGS), of_pairs, *of_answers]
    return torch.stack(ways)


def assert_scores(found: torch.Tensor, expected: torch.Tensor) -> None:
    """(ways, N) or (N,): scores of one text agree to 1e-5."""
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=LOGITS)


@torch.no_grad()
def classifier_scores(folder: Path) -> torch.Tensor:
    """(paddings, N): by `transformers`' own class, padded with the token of its config."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    pad, ways = model.config.get_text_config().pad_token_id, []
    for name in PADDINGS:
        scores = []
        for ids, mask in padded(name, fill=pad):
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            if takes_positions:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            scores.append(model(**inputs).logits.squeeze(-1))
        ways.append(torch.cat(scores))
    return torch.stack(ways)


def noted_scores(folder: Path, texts: list[str]) -> torch.Tensor:
    """(N,): what the code in the folder's note computes for these texts."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "REWARD_MODEL.md").read_text(), re.S)
    code = code.replace('folder = "."', f"folder = {str(folder)!r}")
    ends = re.compile(r"texts = \[.*?\]\n", re.S)
    assert ends.search(code)
    names: dict = {"given": texts}
    exec(ends.sub("texts = [text + tokenizer.eos_token for text in given]\n", code), names)
    return names["scores"]
