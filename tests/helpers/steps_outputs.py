"""Readers of a run's output for the end-to-end tests: metrics and model folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from tests.helpers.rounding import DIFFERENT, LOGITS, adam_tolerance, weight_rtol
from tests.helpers.steps import EPS
from tests.helpers.tiny import EOS, VOCABULARY


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def column(rows: list[dict[str, float]], *names: str) -> torch.Tensor:
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


def assert_all_finite(folder: Path) -> None:
    assert records(folder, "train")
    for kind in ("train", "eval"):
        for record in records(folder, kind):
            values = [value for name, value in record.items() if name != "kind"]
            assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in values), record


def load(kind: type, folder: Path) -> PreTrainedModel:
    """A model as transformers loads it, without a network; every weight must come from there."""
    model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert tokenizer.chat_template
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    return model.eval()


def assert_on_policy(folder: Path, iterations: int) -> None:
    """One update per rollout: the policy that sampled is the one that learns, every time."""
    train = records(folder, "train")
    assert [record["step"] for record in train] == [*range(1, iterations + 1)]
    ones = torch.ones(iterations, 1, dtype=torch.float64)
    torch.testing.assert_close(column(train, "ratio"), ones, rtol=0, atol=LOGITS)
    torch.testing.assert_close(column(train, "clip_fraction"), 0 * ones, rtol=0, atol=0)
    # At first the policy is its own reference; afterwards it has moved.
    assert train[0]["kl"] == pytest.approx(0, abs=LOGITS)
    assert abs(train[1]["kl"]) > DIFFERENT


def evaluation_ids(folder: Path, side: str) -> list[tuple[list[int], int]]:
    """Ids of each evaluation row with the end token, and the length of its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    rows = map(json.loads, (folder / "data" / "test.jsonl").read_text().splitlines())
    return [
        ([*tokenizer(row["prompt"] + row[side])["input_ids"], EOS], len(row["prompt"]))
        for row in rows
    ]


def assert_same_weights(one: Path, other: Path, rate: float) -> None:
    """Two runs with adam.json trained the same weights but for rounding: adapter or model.

    Args:
        rate: the largest learning rate of all weights.
    """
    adapter, steps = "adapter/adapter_model.safetensors", len(records(one, "train"))
    saved = adapter if (one / adapter).is_file() else "model.safetensors"
    weights, bound = load_file(one / saved), adam_tolerance([rate] * steps, EPS, max_norm=1.0)
    for name, tensor in load_file(other / saved).items():
        torch.testing.assert_close(tensor, weights[name], rtol=weight_rtol(steps), atol=bound)
