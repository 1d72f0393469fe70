"""The choice of a run's rollout engine: the fastest that passes its proof."""

from __future__ import annotations

import contextlib

import torch
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import unwrap
from dschat.rlhf.gathered_rollout import GatheredRollout
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.rlhf.run_settings import PPORunSettings
from dschat.rlhf.static_model import IN_SHARDS, StaticModel
from dschat.rlhf.static_proof import disproof
from dschat.rlhf.static_rollout import StaticRollout
from dschat.rlhf.vllm_setup import vllm_rollout
from dschat.utils.distributed import Distributed, print_rank_0
from dschat.utils.module.lora import fused_bytes
from dschat.utils.zero import gathered_whole, is_partitioned

# Adapters are fused unasked where this takes less than an update of the model does, and where
# fused weights are no other policy: in fp32.
SMALL_COPY = 32 * 2**20


def choose_engine(
    settings: PPORunSettings,
    roles: DeepSpeedRLHFEngine,
    tokenizer: PreTrainedTokenizerBase,
    process: Distributed,
) -> RolloutEngine:
    """Build the engine that `rollout_engine` names, or the fastest one; say which, in one line.

    Raises:
        UserError: an engine was asked for that the model does not pass the proof of.
    """
    if settings.rollouts.rollout_engine == "vllm":
        return vllm_rollout(settings, roles.actor, tokenizer, process)
    actor, asked, fuse = (
        roles.actor,
        settings.rollouts.rollout_engine,
        settings.rollouts.fuse_lora_for_generation,
    )
    is_whole, waits = settings.rollouts.gather_for_rollouts, roles.synced_gpus
    plain: RolloutEngine
    plain = TransformersRollout(actor, tokenizer, waits and not is_whole, fuse)
    if is_whole:
        plain = GatheredRollout(TransformersRollout(unwrap(actor), tokenizer), actor)
    if asked == "generate":
        return plain
    static, reason = StaticModel(unwrap(actor)), None
    if not is_whole and any(map(is_partitioned, static.model.parameters())):
        reason = IN_SHARDS  # though a pass may just have left them whole
    if reason is None:
        with gathered_whole(actor) if is_whole else contextlib.nullcontext():
            reason = disproof(static, settings.max_seq_len)
    if reason is not None:
        if asked == "static":
            raise UserError(
                f"rollout_engine static: {reason}; use rollout_engine auto, which then generates "
                "by transformers"
            )
        print_rank_0(f"rollouts: generate of transformers; no static cache: {reason}")
        return plain
    rows = settings.ppo.chunk_rows(settings.ppo.answers_per_prompt)
    if is_whole:
        print_rank_0("rollouts: static cache, on weights that are gathered once for each rollout")
        return GatheredRollout(StaticRollout(static, tokenizer, rows), actor)
    copy = fused_bytes(static.model)
    fuse = fuse or (0 < copy <= SMALL_COPY and static.dtype == torch.float32)
    line = "rollouts: static cache" + (", recorded steps" if static.is_recording else "")
    if fuse:
        line += f", adapters fused with the weights ({copy / 2**20:.3g} MiB more meanwhile)"
    print_rank_0(f"{line}; its logits are those of entire texts")
    return StaticRollout(static, tokenizer, rows, fuse)
