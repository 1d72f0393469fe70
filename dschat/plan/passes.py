"""The passes of the steps, as the recipes call them, on rows of full length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dschat.functional.losses import pairwise_loss, policy_loss, value_loss
from dschat.models.causal_lm import forward_inputs
from dschat.models.logprobs import answer_logprobs, target_logprobs, target_loss
from dschat.models.packing import packed_inputs
from dschat.models.reward_model import scores_at_end
from dschat.models.right_padding import needed_mask, right_padded_inputs

Made = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """One pass over `rows` of `length` tokens.

    Attributes:
        run: (model, (rows, length) ids, mask) -> the loss to go backward from, or what is kept.
        key: tells passes with different results apart. trains: forward and backward.
    """

    key: tuple
    rows: int
    length: int
    run: Made
    trains: bool = True


def sft_pass(rows: int, length: int) -> Pass:
    """Step 1, every token trained."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return target_loss(model, right_padded_inputs(model, ids, mask), mask)

    return Pass(("sft",), rows, length, run)


def packed_pass(rows: int, length: int) -> Pass:
    """Step 1 on packed rows, with a mask for each pair of places."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(length).expand_as(ids)
        return target_loss(model, packed_inputs(model, ids, positions), mask)

    return Pass(("packed",), rows, length, run)


def reward_pass(pairs: int, length: int) -> Pass:
    """Step 2: a pair is two rows."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = model(ids, needed_mask(model, ids, mask))
        chosen, rejected = scores_at_end(values, mask).chunk(2)
        return pairwise_loss(chosen, rejected, torch.ones_like(chosen, dtype=torch.bool))

    return Pass(("reward",), 2 * pairs, length, run)


def preference_pass(pairs: int, length: int) -> Pass:
    """DPO: a pair is two rows, every token scored."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = target_logprobs(model, ids, mask, mask)
        chosen, rejected = found.double().sum(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).sum()

    return Pass(("dpo",), 2 * pairs, length, run)


def actor_pass(rows: int, prompt: int, answer: int) -> Pass:
    """The policy's update on answers after prompts."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scored = answer_logprobs(model, ids, mask, answer, with_entropy=True)
        old = torch.zeros_like(scored.logprobs)
        ratio = torch.exp(scored.logprobs - old)
        return policy_loss(ratio, old, mask[:, -answer:], (0.2, 0.2))

    return Pass(("actor", answer), rows, prompt + answer, run)


def critic_pass(rows: int, prompt: int, answer: int) -> Pass:
    """The critic's update on the same rows."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = model(ids, mask)[:, -answer - 1 : -1]
        old = torch.zeros_like(values)
        return value_loss(values, old, old, mask[:, -answer:], 0.2)

    return Pass(("critic", answer), rows, prompt + answer, run)


def scoring_pass(rows: int, prompt: int, answer: int) -> Pass:
    """Log-probabilities of answers, without gradient."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return answer_logprobs(model, ids, mask, answer).logprobs

    return Pass(("scoring", answer), rows, prompt + answer, run, trains=False)


def prefill_pass(rows: int, length: int) -> Pass:
    """Rows of this length through the trunk, keys and values kept: what generation starts with."""

    def run(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = forward_inputs(model, ids, mask)
        return model(**inputs, use_cache=True, logits_to_keep=1)

    return Pass(("prefill",), rows, length, run, trains=False)
