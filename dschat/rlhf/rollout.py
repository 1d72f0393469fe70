"""Prompts in, sampled and scored answers out: the Experience that PPO learns from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dschat.errors import UserError
from dschat.losses import token_logprobs
from dschat.rlhf.experience import Experience
from dschat.rlhf.returns import answer_mask_from
from dschat.utils.data.collators import PromptBatch
from dschat.utils.model.model_utils import forward_inputs, position_ids_from, takes_argument, unwrap


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn; the defaults sample the policy itself, as PPO assumes."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_answer_seq_len is {self.max_new_tokens}: give at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}: give a number above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a share in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give 0 (off) or more")


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *,
    eos_token_id: int,
    pad_token_id: int,
    synced_gpus: bool = False,
) -> torch.Tensor:
    """Sample one answer for every prompt.

    Args:
        model: a causal LM or an engine around one, in eval mode.
        synced_gpus: ranks go on together until all have ended (needed under ZeRO-3).

    Returns:
        (B, P + A) ids; A is the longest answer's length, rows that ended early are padded.
    """
    module = unwrap(model)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask.long()}
    if takes_argument(module, "position_ids"):
        inputs["position_ids"] = position_ids_from(prompts.attention_mask)
    with _own_generation_config(module, config):
        return module.generate(**inputs, generation_config=config, synced_gpus=synced_gpus)


@contextlib.contextmanager
def _own_generation_config(module: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the folder's sampling settings: `generate` would fill ours up from them."""
    kept, module.generation_config = module.generation_config, config
    try:
        yield
    finally:
        module.generation_config = kept


def answer_logprobs(
    model: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 log-probabilities of the last `answer_length` tokens, and the logits behind them.

    Args:
        sequences: (B, P + A), prompts padded on the left. attention_mask: the same shape, bool.

    Returns:
        (B, A) log-probabilities and (B, A, V) logits; no logits are made for the prompt where the
        model allows it.
    """
    inputs = forward_inputs(model, sequences, attention_mask)
    if takes_argument(model, "logits_to_keep"):
        inputs["logits_to_keep"] = answer_length + 1
    logits = model(**inputs, use_cache=False).logits[:, -answer_length - 1 : -1]
    return token_logprobs(logits, sequences[:, -answer_length:]), logits


def answer_values(
    critic: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
) -> torch.Tensor:
    """(B, A) values of the state before each answer token."""
    return critic(sequences, attention_mask)[:, -answer_length - 1 : -1]


def pad_rows(prompts: PromptBatch, rows: int) -> PromptBatch:
    """Fill a short batch up to `rows` with copies that are marked as not real.

    Every rank then makes the same number of forward passes.
    """
    missing = rows - len(prompts.real)
    if missing <= 0:
        return prompts
    index = torch.cat([torch.arange(len(prompts.real)), torch.zeros(missing, dtype=torch.long)])
    real = torch.cat([prompts.real, torch.zeros(missing, dtype=torch.bool)])
    return PromptBatch(prompts.input_ids[index], prompts.attention_mask[index], real)


@torch.no_grad()
def make_experience(
    roles,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *,
    score_batch_size: int,
) -> Experience:
    """Roll out and score: generation, then every role's forward passes in eval mode.

    Args:
        roles: a `DeepSpeedRLHFEngine`.
        prompts: on the device, `pad_rows` applied.
        score_batch_size: rows of one scoring pass, like a training pass.
    """
    roles.eval()
    tokenizer, start = roles.tokenizer, time.perf_counter()
    sequences = generate(
        roles.actor,
        prompts,
        sampling,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=roles.generates_in_step,
    )
    seconds = time.perf_counter() - start
    answers = sequences[:, prompts.input_ids.shape[1] :]
    answer_mask = answer_mask_from(answers, tokenizer.eos_token_id)
    attention_mask = torch.cat([prompts.attention_mask, answer_mask], dim=1)
    ended = ((answers == tokenizer.eos_token_id) & answer_mask).any(dim=-1)

    columns = {"logprobs": [], "ref_logprobs": [], "values": [], "scores": []}
    for ids, mask in zip(
        sequences.split(score_batch_size), attention_mask.split(score_batch_size), strict=True
    ):
        length = answers.shape[1]
        columns["logprobs"].append(answer_logprobs(roles.actor, ids, mask, length)[0])
        columns["ref_logprobs"].append(roles.reference_logprobs(ids, mask, length))
        columns["values"].append(answer_values(roles.critic, ids, mask, length))
        columns["scores"].append(roles.reward_scores(ids, mask, length))
    scored = {name: torch.cat(parts) for name, parts in columns.items()}
    scored["values"] = scored["values"] * answer_mask
    answer_mask = answer_mask & prompts.real.unsqueeze(-1)
    return Experience(
        sequences,
        attention_mask,
        answer_mask,
        ended,
        prompts.real,
        **scored,
        group=torch.arange(len(sequences), device=sequences.device),
        generation_seconds=seconds,
    )
