"""Pairs for the LoRA+ grid: a reward model on a trunk, and DPO of a language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.lora_plus.tasks import EVAL_BATCH, WORLD_SEED, tokenised
from benchmarks.lora_plus.training import Losses, Row, Task
from dschat.data.batches import PreferenceBatch
from dschat.data.collators import PreferenceCollator
from dschat.functional.losses import pairwise_loss
from dschat.functional.preferences import PREFERENCE_LOSSES
from dschat.models.causal_lm import check_context, create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.evaluation import pair_scores
from dschat.train.pair_logprobs import pair_logprobs
from dschat.train.preferences import Objective
from dschat.train.reference import Precomputed


def pair_task(name: str, model_name: str, data_path: str, max_seq_len: int, work: Path) -> Task:
    """A model folder, to learn the order of the pairs of `data_path`: `reward` or `dpo`.

    Raises:
        UserError: bad input.
    """
    tokenizer = load_hf_tokenizer(model_name)
    check_context(model_name, max_seq_len, "max_seq_len")
    parts = tokenised(data_path, tokenizer, max_seq_len, work, phase=2)
    train, held_out = _numbered(*parts)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    evaluation = _batches(held_out, collate)
    torch.manual_seed(WORLD_SEED)
    if name == "reward":
        model: nn.Module = create_critic_model(
            model_name, tokenizer, torch.float32, init_head=True
        ).train()
        return Task(name, model, train, evaluation, collate, reward_losses)
    model = create_hf_model(model_name, tokenizer, torch.float32)
    loss = PREFERENCE_LOSSES["sigmoid"]
    objective = Objective(loss, loss.defaults, _reference(model, train + held_out, collate))

    def dpo_losses(policy: nn.Module, batch: PreferenceBatch) -> Losses:
        total, figures = objective(policy, batch)
        return Losses(total, int(batch.real.sum()), figures.sums["accuracy"])

    return Task(name, model, train, evaluation, collate, dpo_losses)


def reward_losses(model: nn.Module, batch: PreferenceBatch) -> Losses:
    """Loss of the reward model's pairs."""
    chosen, rejected = pair_scores(model, batch)
    right = ((chosen > rejected) + 0.5 * (chosen == rejected)).sum().item()
    return Losses(pairwise_loss(chosen, rejected, batch.real), int(batch.real.sum()), right)


def _numbered(train: list[Row], held_out: list[Row]) -> tuple[list[Row], list[Row]]:
    """Number all rows on, as the reference's table has them."""
    rows = [row | {"number": number} for number, row in enumerate(train + held_out)]
    return rows[: len(train)], rows[len(train) :]


def _batches(rows: list[Row], collate: PreferenceCollator) -> list[PreferenceBatch]:
    return [collate(rows[start : start + EVAL_BATCH]) for start in range(0, len(rows), EVAL_BATCH)]


@torch.no_grad()
def _reference(model: nn.Module, rows: list[Row], collate: PreferenceCollator) -> Precomputed:
    """Log-probabilities of all pairs under the model that training starts from."""
    found = [torch.stack(pair_logprobs(model, b), -1) for b in _batches(rows, collate)]
    return Precomputed(torch.cat(found), "start")
