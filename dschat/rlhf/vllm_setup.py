"""Servers of vLLM before a run: what can be asked without weights, then a proof with them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.models.causal_lm import eval_mode
from dschat.models.config import load_config
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.generation import answer_ends
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.ppo_rules import FOREIGN_GAP
from dschat.rlhf.run_settings import PPORunSettings
from dschat.rlhf.vllm_adapters import AdapterSender
from dschat.rlhf.vllm_rollout import VLLMRollout
from dschat.rlhf.vllm_server import VLLMServer
from dschat.utils.distributed import Distributed, all_reduce_sum, on_every_rank, print_rank_0
from dschat.utils.module.adapter_write import AdapterOrigin
from dschat.utils.waiting import from_waiting_main

TEXT = "How many sheep are 3 + 4? Se7en, naïve; 羊\n"  # that tokenizers part in ways of their own
ROWS, WIDTH, TOKENS = 4, 8, 16  # of the proof


def servers_of(settings: PPORunSettings) -> list[VLLMServer]:
    """List the servers."""
    return [
        VLLMServer(url, settings.rollouts.vllm.vllm_timeout)
        for url in settings.rollouts.vllm.vllm_url
    ]


def check_servers(settings: PPORunSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ask each server what it serves, before anything is loaded; every rank calls it.

    Raises:
        UserError: on every rank: one does not answer, takes shorter texts, or has another
            tokenizer.
    """
    if settings.rollouts.rollout_engine == "vllm":
        from_waiting_main(functools.partial(_check_each, settings, tokenizer))


def _check_each(settings: PPORunSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    for server in servers_of(settings):
        if settings.rollouts.vllm.vllm_sleep:
            server.wake_up()
        model, longest = server.model()
        if longest is not None and longest < settings.max_seq_len:
            raise UserError(
                f"vllm_url {server.url}: it takes texts of {longest} tokens, a prompt and its "
                f"answer have up to {settings.max_seq_len}; start it with --max-model-len "
                f"{settings.max_seq_len} or more"
            )
        if server.tokens_of(TEXT, model) != ids:
            actor = settings.roles.actor_model_name_or_path
            raise UserError(
                f"vllm_url {server.url}: the tokenizer of {model} makes other ids of a text than "
                f"that of {actor}; let it serve {actor}"
            )
    return ""


def vllm_rollout(
    settings: PPORunSettings,
    actor: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    process: Distributed,
) -> VLLMRollout:
    """Build the engine, prove it on the actor's present weights, and say so in one line.

    Raises:
        UserError: on every rank, where the servers sample another policy.
    """
    name, output = settings.roles.actor_model_name_or_path, settings.run.output_dir
    vocabulary = load_config(name).get_text_config().vocab_size
    folder = Path(settings.rollouts.vllm.vllm_adapter_dir or Path(output) / "vllm_adapters")
    sender = AdapterSender(
        actor,
        AdapterOrigin(name, settings.actor.lora, vocabulary),
        folder,
        servers_of(settings),
        process,
        run=str(Path(output).resolve()),
    )
    sender.outline()  # whether it can be sent at all
    sleeps = settings.rollouts.vllm.vllm_sleep
    engine = on_every_rank(lambda: VLLMRollout(sender, tokenizer, sleeps))
    tokens, gap = _proved(engine, actor, settings.ppo.sampling.temperature)
    print_rank_0(
        f"rollouts: vllm, {engine.base} at {', '.join(settings.rollouts.vllm.vllm_url)}; "
        f"log-probabilities of {tokens:.0f} tokens are {gap:.2g} nats off the actor's in the mean"
    )
    return engine


def _proved(engine: VLLMRollout, actor: nn.Module, temperature: float) -> tuple[float, float]:
    """Compare a few answers to prompts of random ids; return tokens and the mean gap in nats."""
    tokenizer, device = engine.tokenizer, next(actor.parameters()).device
    generator = torch.Generator().manual_seed(0)  # the run's own noise stays as it is
    ids = torch.randint(len(tokenizer), (ROWS, WIDTH), generator=generator).to(device)
    seen = torch.ones_like(ids, dtype=torch.bool)
    config = SamplingConfig(TOKENS, temperature=temperature)
    with torch.random.fork_rng(devices=[]):
        sampled = engine.generate(PromptBatch(ids, seen, seen[:, 0]), config)
    sampler_logprobs, answers = sampled.logprobs, sampled.sequences[:, WIDTH:]
    assert sampler_logprobs is not None
    mask, _ = answer_ends(answers, tokenizer)
    with eval_mode(actor), torch.no_grad():
        own = answer_logprobs(
            actor,
            sampled.sequences,
            torch.cat([seen, mask], dim=1),
            answers.shape[1],
            temperature=temperature,
        ).logprobs
    apart = ((sampler_logprobs - own).abs() * mask).sum().item()
    apart, tokens = all_reduce_sum([apart, mask.sum().item()])
    gap = apart / tokens
    if not gap <= FOREIGN_GAP:  # a NaN is no agreement
        raise UserError(
            f"rollout_engine vllm: {engine.base} at {engine.server.url} samples another policy: "
            f"log-probabilities of {tokens:.0f} tokens are {gap:.2g} nats off the actor's in the "
            "mean; let it serve the actor's folder, with --logprobs-mode processed_logprobs"
        )
    return tokens, gap
