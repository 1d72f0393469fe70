"""Scoring: sampled answers to the Experience that PPO learns from, under every role."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from dschat.data.batches import PromptBatch
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.answering import Generated
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.generation import answer_ends
from dschat.rlhf.kept_pass import KeptPass
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


@torch.no_grad()
def scored(
    roles: DeepSpeedRLHFEngine,
    batches: list[PromptBatch],
    generated: Generated,
    config: PPOConfig,
    answers_per_prompt: int,
    *,
    fresh: bool = False,
    keeps_pass: bool = False,
) -> list[Experience]:
    """Score answers by every role's forward passes in eval mode.

    Args:
        batches: of prompts, `ready`.
        fresh: the only step on the answers is made before the policy changes; it is not run over
            them beforehand where the engine tells log-probabilities that serve as well.
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
    columns = zip(batches, answers, logprobs, groups.split(sizes), strict=True)
    # Where the KL penalty is in the loss they are but reported.
    serves = generated.exact or config.estimator.kl_in_loss
    fresh = fresh and generated.logprobs is not None and serves
    experiences = [
        score(roles, *column, config, fresh=fresh, keeps_pass=keeps_pass) for column in columns
    ]
    return [replace(experiences[0], generation_steps=generated.steps), *experiences[1:]]


def score(
    roles: DeepSpeedRLHFEngine,
    prompts: PromptBatch,
    answers: torch.Tensor,
    sampler_logprobs: torch.Tensor | None,
    group: torch.Tensor,
    config: PPOConfig,
    *,
    fresh: bool = False,
    keeps_pass: bool = False,
) -> Experience:
    """Score one batch of prompts and the (B, A) ids generated for it under every role.

    The experience is no wider than its longest answer. Passes have the shape of training passes.
    """
    mask, ended = answer_ends(answers, roles.tokenizer, config.sampling.stop_strings)
    length = int(mask.sum(dim=-1).max())
    mask, answers = mask[:, :length], answers[:, :length]
    sequences = torch.cat([prompts.input_ids, answers], dim=1)
    attention_mask = torch.cat([prompts.attention_mask, mask], dim=1)
    joint, kept = _passes(roles, sequences, attention_mask, length, config, fresh, keeps_pass)
    if sampler_logprobs is not None:
        sampler_logprobs = sampler_logprobs[:, :length]
    if fresh:
        joint["logprobs"] = filled(sampler_logprobs).where(mask, 0.0)
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
        sampler_logprobs=sampler_logprobs,
        fresh=fresh,
        kept=kept,
        columns=prompts.columns,
    )


def _passes(
    roles: DeepSpeedRLHFEngine,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    length: int,
    config: PPOConfig,
    fresh: bool,
    keeps_pass: bool,
) -> tuple[dict[str, torch.Tensor], KeptPass | None]:
    """Run every role over (B, P + A) ids, so many rows at a time as in training.

    Returns:
        (B, A) logprobs (not where `fresh`), ref_logprobs and values, (B,) model_scores, as far as
        there are such roles; and the critic's pass, if it is kept.
    """
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    kept: KeptPass | None = None
    size, temperature = config.per_device_training_batch_size, config.sampling.temperature
    for ids, seen in zip(sequences.split(size), attention_mask.split(size), strict=True):
        if not fresh:
            scored = answer_logprobs(roles.actor, ids, seen, length, temperature=temperature)
            columns["logprobs"].append(scored.logprobs)
        columns["ref_logprobs"].append(
            roles.reference_logprobs(ids, seen, length, temperature=temperature)
        )
        if roles.has_reward_model:
            columns["model_scores"].append(roles.reward_scores(ids, seen, length))
        if roles.critic is not None:  # last: a pass that is kept holds its activations
            values, kept = critic_values(roles.critic, ids, seen, length, keeps_pass=keeps_pass)
            columns["values"].append(values)
    return {name: torch.cat(parts) for name, parts in columns.items()}, kept
