"""Rollouts: prompts in, sampled and scored answers out, as the Experience that PPO learns from."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from dschat.data.collators import PromptBatch
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.generation import Sampled, answer_ends
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout_engine import RolloutEngine


def answer_values(
    critic: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
) -> torch.Tensor:
    """(B, A) values of the states before the answer tokens."""
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
    return replace(prompts.rows(index), real=real)


@torch.no_grad()
def make_experience(
    roles: DeepSpeedRLHFEngine,
    engine: RolloutEngine,
    batches: list[PromptBatch],
    config: PPOConfig,
    answers_per_prompt: int,
    *,
    fresh: bool = False,
) -> list[Experience]:
    """Generate answers, then score them by every role's forward passes in eval mode.

    The number of passes depends on the number of batches alone, on every rank.

    Args:
        batches: of prompts, on any device.
        answers_per_prompt: in place of the configured number; evaluation takes one.
        fresh: the only step on the answers is made before the policy changes; it is not run over
            them beforehand where the engine tells log-probabilities.

    Returns:
        One experience for each batch, its rows in the batch's order, the answers to one prompt
        side by side.
    """
    roles.eval()
    batches = [pad_rows(batch, config.per_device_generation_batch_size) for batch in batches]
    batches = [repeated(batch, answers_per_prompt).to(roles.device) for batch in batches]
    start = time.perf_counter()
    generated = generate_sorted(
        engine,
        joined(batches),
        config.sampling,
        config.chunk_rows(answers_per_prompt),
        roles.tokenizer.pad_token_id,
    )
    seconds = time.perf_counter() - start
    sizes = [len(batch.real) for batch in batches]
    groups = torch.arange(sum(sizes), device=roles.device) // answers_per_prompt
    answers, told = generated.answers.split(sizes), [None] * len(sizes)
    logprobs = told if generated.logprobs is None else generated.logprobs.split(sizes)
    columns = zip(batches, answers, logprobs, groups.split(sizes), strict=True)
    fresh = fresh and generated.logprobs is not None
    experiences = [score(roles, *column, config, fresh=fresh) for column in columns]
    first = replace(experiences[0], generation_seconds=seconds, generation_steps=generated.steps)
    return [first, *experiences[1:]]


def repeated(prompts: PromptBatch, times: int) -> PromptBatch:
    """Repeat every row, copies side by side."""
    return prompts.rows(torch.arange(len(prompts.real)).repeat_interleave(times))


def joined(batches: list[PromptBatch]) -> PromptBatch:
    """Concatenate batches, without their own columns; ids under the new padding are 0."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def stacked(columns: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([F.pad(column, (width - column.shape[1], 0)) for column in columns])

    return PromptBatch(
        stacked([batch.input_ids for batch in batches]),
        stacked([batch.attention_mask for batch in batches]),
        torch.cat([batch.real for batch in batches]),
    )


@dataclass(frozen=True)
class Generated:
    """Answers to many prompts, rows in the prompts' order."""

    answers: torch.Tensor  # (R, A) ids, padded after their ends
    logprobs: torch.Tensor | None  # (R, A) fp32, by the sampler; None: it does not tell
    steps: int  # decoding steps, in sequence


def generate_sorted(
    engine: RolloutEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    chunk_rows: int,
    pad_token_id: int,
) -> Generated:
    """Generate in chunks of rows of like length, each only as wide as its longest prompt.

    When one chunk holds all rows they keep their order; an engine that refills gets all rows.
    """
    chunk_rows = len(prompts.real) if engine.refills else chunk_rows
    lengths = prompts.attention_mask.sum(dim=-1)
    order = torch.arange(len(lengths), device=lengths.device)
    if len(lengths) > chunk_rows:
        order = lengths.argsort(stable=True)
    parts: list[Sampled] = []
    for index in order.split(chunk_rows):
        width = int(lengths[index].max())
        ids, mask = prompts.input_ids[index, -width:], prompts.attention_mask[index, -width:]
        # A model may look at the ids under padding: they are those of its own padding.
        ids = ids.masked_fill(~mask, pad_token_id)
        sampled = engine.generate(PromptBatch(ids, mask, prompts.real[index]), sampling)
        parts.append(replace(sampled, sequences=sampled.sequences[:, width:]))
    widths = [part.sequences.shape[1] for part in parts]

    def rows(columns: list[torch.Tensor], fill: int) -> torch.Tensor:
        wide = [F.pad(c, (0, max(widths) - c.shape[1]), value=fill) for c in columns]
        return torch.cat(wide)[order.argsort()]

    told = [part.logprobs for part in parts if part.logprobs is not None]
    return Generated(
        rows([part.sequences for part in parts], pad_token_id),
        rows(told, 0) if len(told) == len(parts) else None,
        sum(part.steps or width for part, width in zip(parts, widths, strict=True)),
    )


def score(
    roles: DeepSpeedRLHFEngine,
    prompts: PromptBatch,
    answers: torch.Tensor,
    sampler_logprobs: torch.Tensor | None,
    group: torch.Tensor,
    config: PPOConfig,
    *,
    fresh: bool = False,
) -> Experience:
    """Score one batch of prompts and the (B, A) ids generated for it under every role.

    The experience is no wider than its longest answer. Passes have the shape of training passes.
    """
    mask, ended = answer_ends(answers, roles.tokenizer, config.sampling.stop_strings)
    length = int(mask.sum(dim=-1).max())
    mask, answers = mask[:, :length], answers[:, :length]
    sequences = torch.cat([prompts.input_ids, answers], dim=1)
    attention_mask = torch.cat([prompts.attention_mask, mask], dim=1)
    temperature = config.sampling.temperature

    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    size = config.per_device_training_batch_size
    for ids, seen in zip(sequences.split(size), attention_mask.split(size), strict=True):
        if not fresh:
            scored = answer_logprobs(roles.actor, ids, seen, length, temperature=temperature)
            columns["logprobs"].append(scored.logprobs)
        columns["ref_logprobs"].append(
            roles.reference_logprobs(ids, seen, length, temperature=temperature)
        )
        if roles.critic is not None:
            columns["values"].append(answer_values(roles.critic, ids, seen, length))
        if roles.has_reward_model:
            columns["model_scores"].append(roles.reward_scores(ids, seen, length))
    joint = {name: torch.cat(parts) for name, parts in columns.items()}
    told = None if sampler_logprobs is None else sampler_logprobs[:, :length]
    if fresh:
        joint["logprobs"] = filled(told).where(mask, 0.0)
    return Experience(
        sequences,
        attention_mask,
        mask & prompts.real.unsqueeze(-1),
        ended,
        prompts.real,
        joint["logprobs"],
        joint["ref_logprobs"],
        values=joint["values"] * mask if "values" in joint else None,
        model_scores=joint.get("model_scores"),
        group=group,
        sampler_logprobs=told,
        fresh=fresh,
        columns=prompts.columns,
    )
