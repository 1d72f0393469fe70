"""Answers to batches of prompts: an engine starts them, in chunks of similar length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dschat.data.batches import PromptBatch
from dschat.rlhf.generation import Sampled
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout_engine import RolloutEngine, RunsApart


@dataclass(frozen=True)
class Generated:
    """Answers to many prompts, rows in the prompts' order."""

    answers: torch.Tensor  # (R, A) ids, padded after their ends
    logprobs: torch.Tensor | None  # (R, A) fp32, by the sampler; None: it does not tell
    steps: int  # decoding steps, in sequence
    exact: bool = False  # see `Sampled`


@dataclass(frozen=True)
class PendingAnswers:
    """Answers to batches of prompts that are being sampled.

    Attributes:
        batches: as the engine has them, on the device. wait: returns the answers.
        updates: of the policy, before they were started.
    """

    batches: list[PromptBatch]
    wait: Callable[[], Generated]
    updates: int


def ready(
    batches: list[PromptBatch], config: PPOConfig, answers_per_prompt: int, device: torch.device
) -> list[PromptBatch]:
    """Fill batches of prompts up, repeat each prompt for its answers, move them to the device."""
    batches = [pad_rows(batch, config.per_device_generation_batch_size) for batch in batches]
    return [repeated(batch, answers_per_prompt).to(device) for batch in batches]


@torch.no_grad()
def begin(
    roles: DeepSpeedRLHFEngine,
    engine: RolloutEngine,
    batches: list[PromptBatch],
    config: PPOConfig,
    answers_per_prompt: int,
    *,
    updates: int = 0,
    ahead: bool = False,
) -> PendingAnswers:
    """Begin to sample answers by the present policy, in eval mode.

    The number of passes depends on the number of batches alone, on every rank.

    Args:
        batches: of prompts, on any device.
        answers_per_prompt: in place of the configured number; evaluation takes one.
        updates: of the policy, so far. ahead: an engine that runs apart goes on meanwhile.
    """
    roles.eval()
    batches = ready(batches, config, answers_per_prompt, roles.device)
    prompts, rows = joined(batches), config.chunk_rows(answers_per_prompt)
    pad = roles.tokenizer.pad_token_id
    return PendingAnswers(
        batches, start_sorted(engine, prompts, config.sampling, rows, pad, ahead=ahead), updates
    )


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


def start_sorted(
    engine: RolloutEngine,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    chunk_rows: int,
    pad_token_id: int,
    *,
    ahead: bool = False,
) -> Callable[[], Generated]:
    """Begin to generate, in chunks of rows of like length, each as wide as its longest prompt.

    When one chunk holds all rows they keep their order; an engine that refills gets all rows.

    Args:
        ahead: as in `started`.

    Returns:
        Waits for the answers, and gives them.
    """
    chunk_rows = len(prompts.real) if engine.refills else chunk_rows
    lengths = prompts.attention_mask.sum(dim=-1)
    order = torch.arange(len(lengths), device=lengths.device)
    if len(lengths) > chunk_rows:
        order = lengths.argsort(stable=True)
    waiting: list[tuple[int, Callable[[], Sampled]]] = []
    for index in order.split(chunk_rows):
        width = int(lengths[index].max())
        ids, mask = prompts.input_ids[index, -width:], prompts.attention_mask[index, -width:]
        # A model may look at the ids under padding: they are those of its own padding.
        ids = ids.masked_fill(~mask, pad_token_id)
        chunk = PromptBatch(ids, mask, prompts.real[index])
        waiting.append((width, started(engine, chunk, sampling, ahead)))
    return lambda: _together(
        [
            replace(sampled, sequences=sampled.sequences[:, width:])
            for width, sampled in ((width, wait()) for width, wait in waiting)
        ],
        order,
        pad_token_id,
    )


def started(
    engine: RolloutEngine, prompts: PromptBatch, sampling: SamplingConfig, ahead: bool
) -> Callable[[], Sampled]:
    """Sample; `ahead`, an engine that runs apart does it meanwhile. The result comes by a call."""
    if ahead and isinstance(engine, RunsApart):
        return engine.start(prompts, sampling)
    sampled = engine.generate(prompts, sampling)
    return lambda: sampled


def _together(parts: list[Sampled], order: torch.Tensor, pad_token_id: int) -> Generated:
    """Put chunks of answers into the rows that they are of."""
    widths = [part.sequences.shape[1] for part in parts]

    def rows(columns: list[torch.Tensor], fill: int) -> torch.Tensor:
        wide = [F.pad(c, (0, max(widths) - c.shape[1]), value=fill) for c in columns]
        return torch.cat(wide)[order.argsort()]

    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Generated(
        rows([part.sequences for part in parts], pad_token_id),
        rows(logprobs, 0) if len(logprobs) == len(parts) else None,
        sum(part.steps or width for part, width in zip(parts, widths, strict=True)),
        all(part.exact for part in parts),
    )
