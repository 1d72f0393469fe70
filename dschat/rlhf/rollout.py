"""Scoring: sampled answers to the Experience that PPO learns from, under every role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.answering import Generated
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.generation import answer_ends
from dschat.rlhf.kept_pass import KeptPass
from dschat.rlhf.micro_batches import MicroBatch, RowLengths, by_length, dealt
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.train.engine import Engine
from dschat.utils.zero import is_partitioned


def answer_values(
    critic: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
) -> torch.Tensor:
    """(B, A) values of the states before the answer tokens."""
    return critic(sequences, attention_mask)[:, -answer_length - 1 : -1]


def critic_values(
    critic: Engine,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_length: int,
    *,
    keeps_pass: bool,
) -> tuple[torch.Tensor, KeptPass | None]:
    """(B, A) values without gradient, and the pass that they are of where it is to be kept.

    At ZeRO-3 none is: the weights that it gathered would have to stay until its backward pass.
    """
    text = sequences, attention_mask, answer_length
    if not keeps_pass or any(map(is_partitioned, critic.module.parameters())):
        return answer_values(critic, *text), None
    critic.train()  # dropout is off; checkpointing is on where it was asked for
    with torch.enable_grad():
        values = answer_values(critic, *text)
    critic.eval()
    return values.detach(), KeptPass.of(critic, values)


@dataclass(frozen=True)
class Texts:
    """Prompts and the answers to them, no wider than the longest answer."""

    sequences: torch.Tensor  # (B, P + A)
    attention_mask: torch.Tensor  # (B, P + A) bool
    answer_mask: torch.Tensor  # (B, A) bool
    ended: torch.Tensor  # (B,) bool

    @classmethod
    def of(
        cls,
        prompts: PromptBatch,
        answers: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str],
    ) -> Texts:
        """Join prompts and the (B, A) ids generated for them, and cut these at their ends."""
        mask, ended = answer_ends(answers, tokenizer, stop_strings)
        length = int(mask.sum(dim=-1).max())
        mask, answers = mask[:, :length], answers[:, :length]
        return cls(
            torch.cat([prompts.input_ids, answers], dim=1),
            torch.cat([prompts.attention_mask, mask], dim=1),
            mask,
            ended,
        )

    def part(self, chosen: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Sequences and mask of a micro-batch, and the length of its answers, in tokens."""
        index, length = chosen.index.to(self.ended.device), self.answer_mask.shape[1]
        start = self.sequences.shape[1] - length
        inside = slice(start - chosen.prompt, start + chosen.answer)
        return self.sequences[index, inside], self.attention_mask[index, inside], chosen.answer


@torch.no_grad()
def scored(
    roles: DeepSpeedRLHFEngine,
    batches: list[PromptBatch],
    generated: Generated,
    config: PPOConfig,
    answers_per_prompt: int,
    *,
    generator: torch.Generator | None = None,
    from_sampler: bool = False,
    keeps_pass: bool = False,
) -> list[Experience]:
    """Score answers by every role's forward passes in eval mode.

    Args:
        batches: of prompts, `ready`.
        generator: of the order of micro-batches in the update that follows; passes are made over
            those of its first epoch. None: over rows of like length.
        from_sampler: the engine's log-probabilities stand for the policy's, which makes no pass
            over the answers.
        keeps_pass: the critic's only step on them is over all of them at once, and can do with the
            pass that gives their values.

    Returns:
        One experience for each batch, its rows in the batch's order, the answers to one prompt
        side by side.
    """
    roles.eval()
    sizes = [len(batch.real) for batch in batches]
    groups = torch.arange(sum(sizes), device=roles.device) // answers_per_prompt
    answers, logprobs = generated.answers.split(sizes), [None] * len(sizes)
    if generated.logprobs is not None:
        logprobs = generated.logprobs.split(sizes)
    stops = config.sampling.stop_strings
    texts = [
        Texts.of(batch, ids, roles.tokenizer, stops)
        for batch, ids in zip(batches, answers, strict=True)
    ]
    lengths = [
        RowLengths.of(text.attention_mask, batch.input_ids.shape[1], batch.real)
        for text, batch in zip(texts, batches, strict=True)
    ]
    planned = _planned(lengths, config, roles.actor.gradient_accumulation_steps(), generator)
    columns = zip(batches, texts, logprobs, groups.split(sizes), planned, strict=True)
    first, *others = (
        score(roles, *column, config, from_sampler=from_sampler, keeps_pass=keeps_pass)
        for column in columns
    )
    return [replace(first, generation_steps=generated.steps), *others]


def _planned(
    lengths: list[RowLengths],
    config: PPOConfig,
    accumulated: int,
    generator: torch.Generator | None,
) -> list[list[MicroBatch]]:
    """Plan the passes over each batch: those of the first epoch, or of rows of like length."""
    size = config.per_device_training_batch_size
    if generator is None:
        return [by_length(rows, size) for rows in lengths]
    return dealt(lengths, size, accumulated, generator)


def score(
    roles: DeepSpeedRLHFEngine,
    prompts: PromptBatch,
    text: Texts,
    sampler_logprobs: torch.Tensor | None,
    group: torch.Tensor,
    planned: list[MicroBatch],
    config: PPOConfig,
    *,
    from_sampler: bool = False,
    keeps_pass: bool = False,
) -> Experience:
    """Score one batch of prompts and their answers under every role, by `planned` passes."""
    mask = text.answer_mask
    joint, kept = _passes(roles, text, planned, config, from_sampler, keeps_pass)
    sampled = None if sampler_logprobs is None else sampler_logprobs[:, : mask.shape[1]]
    if from_sampler:
        joint["logprobs"] = filled(sampled).where(mask, 0.0)
    return Experience(
        text.sequences,
        text.attention_mask,
        mask & prompts.real.unsqueeze(-1),
        text.ended,
        prompts.real,
        joint["logprobs"],
        joint["ref_logprobs"],
        values=joint["values"] * mask if "values" in joint else None,
        model_scores=joint.get("model_scores"),
        group=group,
        sampler_logprobs=sampled,
        from_sampler=from_sampler,
        kept=kept,
        micro_batches=planned,
        columns=prompts.columns,
    )


def _passes(
    roles: DeepSpeedRLHFEngine,
    text: Texts,
    planned: list[MicroBatch],
    config: PPOConfig,
    from_sampler: bool,
    keeps_pass: bool,
) -> tuple[dict[str, torch.Tensor], KeptPass | None]:
    """Run every role over the micro-batches.

    Returns:
        (B, A) logprobs (not where `from_sampler`), ref_logprobs and values, (B,) model_scores, as
        far as there are such roles; and the critic's pass, if it is kept.
    """
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    kept: KeptPass | None = None
    length, temperature = text.answer_mask.shape[1], config.sampling.temperature

    def add(name: str, column: torch.Tensor) -> None:
        wide = column if column.dim() == 1 else F.pad(column, (0, length - column.shape[1]))
        columns[name].append(wide)

    for chosen in planned:
        part = text.part(chosen)
        if not from_sampler:
            add("logprobs", answer_logprobs(roles.actor, *part, temperature=temperature).logprobs)
        add("ref_logprobs", roles.reference_logprobs(*part, temperature=temperature))
        if roles.has_reward_model:
            add("model_scores", roles.reward_scores(*part))
        if roles.critic is not None:  # last: a pass that is kept holds its activations
            values, kept = critic_values(roles.critic, *part, keeps_pass=keeps_pass)
            add("values", values)
    back = torch.cat([chosen.index for chosen in planned]).argsort().to(text.ended.device)
    joint = {name: torch.cat(parts)[back] for name, parts in columns.items()}
    return joint, None if kept is None else kept.rows(back)
