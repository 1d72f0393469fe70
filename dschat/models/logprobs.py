"""Log-probabilities of tokens: the trunk in one pass, the output head in blocks of tokens.

The head sees the states that predict scored tokens alone, and no tensor over all of them and the
vocabulary exists. `answer_logprobs` scores the last columns of a batch, as generation makes them,
`target_logprobs` and `target_loss` the positions of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dschat.models.causal_lm import forward_inputs, takes_argument
from dschat.models.head import pass_through, split_of
from dschat.models.head_blocks import HeadBlocks
from dschat.models.right_padding import right_padded_inputs


@dataclass(frozen=True)
class AnswerScores:
    """Scores of answers under a policy; both are 0 where the attention mask is False."""

    logprobs: torch.Tensor  # (B, A) fp32, of the answers' tokens
    entropy: torch.Tensor | None  # (B, A) fp32 nats without gradient; None unless requested


def answer_logprobs(
    model: nn.Module,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_length: int,
    *,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> AnswerScores:
    """Log-probabilities of the last `answer_length` tokens.

    Args:
        model: a causal LM or an engine around one; called once, whatever the answers' lengths.
        sequences: (B, P + A), prompts padded on the left. attention_mask: the same shape, bool.
        temperature: logits are divided by it, as in sampling.
    """
    split, mask = split_of(model, sequences), attention_mask[:, -answer_length:]
    scores: Sequence[torch.Tensor]
    if split is None:
        columns = _from_logits(
            model, sequences, attention_mask, answer_length, temperature, with_entropy
        )
        scores = [column.where(mask, 0.0) for column in columns]
    else:
        targets = sequences[:, -answer_length:][mask]  # (N,)

        def score(head: HeadBlocks, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            before = states[:, -answer_length - 1 : -1][mask]  # (N, H)
            head = dataclasses.replace(head, temperature=temperature, with_entropy=with_entropy)
            return head.columns(before, targets)

        inputs = forward_inputs(split.trunk, sequences, attention_mask)
        found = pass_through(model, split, inputs, score)
        scores = [found[0].new_zeros(mask.shape).masked_scatter(mask, column) for column in found]
    return AnswerScores(scores[0], scores[1] if with_entropy else None)


def target_logprobs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of some tokens of right-padded sequences: (B, T) fp32, 0 elsewhere.

    Args:
        model: a causal LM or an engine around one; called once, also without any target.
        targets: (B, T) bool, True where the token is to be predicted; a sequence's first token has
            nothing before it and never is.
    """
    inputs = right_padded_inputs(model, input_ids, attention_mask)

    def score(head: HeadBlocks, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return head.columns(states, ids)[0]

    found = _at_targets(model, inputs, targets, score)
    logprobs = found.new_zeros(input_ids.shape)
    logprobs[:, 1:][targets[:, 1:]] = found
    return logprobs


def target_loss(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """Sum of -log p over the tokens to be predicted, a scalar in fp32.

    Args:
        model: a causal LM or an engine around one; called once, also without any target.
        inputs: keyword arguments of its forward pass. targets: as in `target_logprobs`.
    """
    return _at_targets(model, inputs, targets, HeadBlocks.loss)


def _at_targets(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    score: Callable[[HeadBlocks, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Score the N wanted tokens, given the head, their states (N, H) and ids (N,)."""
    input_ids, wanted = inputs["input_ids"], targets[:, 1:]
    ids = input_ids[:, 1:][wanted]
    split = split_of(model, input_ids)
    if split is None:
        logits = model(**inputs, use_cache=False).logits[:, :-1][wanted]
        return score(_made(logits), logits, ids)
    return pass_through(
        model, split, dict(inputs), lambda head, states: score(head, states[:, :-1][wanted], ids)
    )


def _made(logits: torch.Tensor) -> HeadBlocks:
    """Head of logits that are there already."""
    return HeadBlocks(lambda x: x, logits.shape[-1])


def _from_logits(
    model: nn.Module,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_length: int,
    temperature: float,
    with_entropy: bool,
) -> list[torch.Tensor]:
    """Score by the model's own logits, unchanged: no copy, none in fp32."""
    inputs = forward_inputs(model, sequences, attention_mask)
    if takes_argument(model, "logits_to_keep"):
        inputs["logits_to_keep"] = answer_length + 1
    logits = model(**inputs, use_cache=False).logits[:, -answer_length - 1 :]
    # The last position predicts nothing; its target is ignored.
    targets = sequences[:, -answer_length - 1 :].roll(-1, dims=1)
    head = dataclasses.replace(_made(logits), temperature=temperature, with_entropy=with_entropy)
    columns = head.columns(logits.flatten(0, 1), targets.flatten())
    return [column.view_as(targets)[:, :-1] for column in columns]
