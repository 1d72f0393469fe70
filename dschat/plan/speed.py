"""Seconds of a step on a GPU of the table, from FLOPs, bytes and stated efficiencies.

Nothing here was measured. A part takes the longest of what it computes and what it reads, plus what
it sends: communication is taken not to overlap, which is the worst case. Rows are of full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from dschat.config import DPOSettings, RLHFSettings
from dschat.plan.memory import AnySettings, training_pass
from dschat.plan.ppo import cache_bytes
from dschat.plan.roles import MemoryPlan, Role
from dschat.plan.states import BYTES, near_shards
from dschat.utils.ds_utils import get_train_ds_config
from dschat.utils.flops import Matrices, causal_pairs, forward_flops, training_flops
from dschat.utils.gpus import Gpu

NETWORK = 25.0  # GB/s of a GPU to another machine: 200 Gbit/s for each
# Shares of the peaks that a well-fed step reaches: matrix products in bf16; reading weights while
# decoding; links.
COMPUTE, MEMORY, LINK = 0.4, 0.6, 0.7
LAUNCH = 0.6e-3  # seconds of a layer in a decoding step, whose kernels start one by one


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, with the shares of their peaks that are counted on."""

    gpu: Gpu
    ranks: int
    nodes: int = 1
    network: float = NETWORK
    compute: float = COMPUTE

    def compute_seconds(self, flops: float, dtype: torch.dtype) -> float:
        """Seconds of so many FLOPs on one GPU."""
        peak = {torch.float32: self.gpu.fp32, torch.float16: self.gpu.fp16}.get(
            dtype, self.gpu.bf16
        )
        return flops / ((peak or self.gpu.fp16) * 1e12 * self.compute)

    def read_seconds(self, size: float) -> float:
        """Seconds of reading so many bytes of a GPU's memory."""
        return size / (self.gpu.bandwidth * 1e9 * MEMORY)

    def ring_seconds(self, size: float, among: int | None = None) -> float:
        """Seconds in which every rank gets, or adds up, its part of `size` bytes of all ranks.

        Args:
            among: so many neighbours, in place of all ranks.
        """
        among = among or self.ranks
        is_near = among <= self.ranks // self.nodes
        link = self.gpu.link if is_near else min(self.gpu.link, self.network)
        return size * (among - 1) / among / (link * 1e9 * LINK)


@dataclass(frozen=True)
class Part:
    """One part of a step on one GPU: its seconds, and those of them that it communicates."""

    name: str
    flops: float
    seconds: float
    sends: float = 0.0


def plan_speed(
    settings: AnySettings,
    memory: MemoryPlan,
    configs: Mapping[str, PretrainedConfig],
    cluster: Cluster,
) -> list[Part] | None:
    """Parts of an optimizer step, in step 3 of an iteration; None without an exact count."""
    if isinstance(settings, RLHFSettings):
        return _ppo_parts(settings, memory, configs, cluster)
    role, made = memory.roles["model"], training_pass(settings)
    matrices = Matrices.of(role.module, role.shape.config)
    if matrices is None:
        return None
    passes = settings.run.engine.gradient_accumulation_steps
    tokens = float(made.rows * made.length)
    parts = [_training("training", role, matrices, (made.rows, tokens), passes, 1, cluster)]
    if isinstance(settings, DPOSettings):
        parts.append(_scoring("reference", role, matrices, made.rows, tokens, passes, cluster))
    return parts


def _training(
    name: str,
    role: Role,
    matrices: Matrices,
    batch: tuple[int, float],
    passes: int,
    steps: int,
    cluster: Cluster,
) -> Part:
    """Forward and backward passes of micro-batches of (rows, tokens), and `steps` updates."""
    assert role.engine is not None
    rows, tokens = batch
    pairs = rows * causal_pairs(tokens / rows)
    forward, backward = training_flops(matrices, tokens, pairs)
    again = forward if role.shape.model.gradient_checkpointing else 0.0
    flops = passes * (forward + backward + again)
    near, far = training_traffic(role, passes, steps, cluster.ranks)
    among = near_shards(role.engine, cluster.ranks)
    sends = cluster.ring_seconds(near, among) + cluster.ring_seconds(far)
    return Part(name, flops, cluster.compute_seconds(flops, role.shape.dtype) + sends, sends)


def training_traffic(role: Role, passes: int, steps: int, ranks: int) -> tuple[float, float]:
    """Bytes that training passes and updates send, of which a rank gets (n - 1) / n.

    DeepSpeed 0.19 averages gradients by all-reduces at stages 1 and 2 too, which is twice what
    sending them to their owners would take; at stage 2 after each pass. (A benchmark counts it.)

    Returns:
        Those that stay among a machine's shards (`near_shards`), and those that all ranks share.
    """
    assert role.engine is not None
    size = BYTES[role.engine.dtype]
    stage = get_train_ds_config(role.engine, ranks)["zero_optimization"]["stage"]  # bf16 at 0: 1
    trained = role.counted.trained * size
    if stage == 3:  # gathered forwards and backwards; gradients to their owners
        frozen = (role.counted.base + role.counted.adapters) * size - trained
        if near_shards(role.engine, ranks) == ranks:
            return 0.0, passes * (2.0 * frozen + 3.0 * trained)
        # What was updated comes from all ranks once, before its machine has a copy.
        return passes * (2.0 * frozen + trained), passes * 2.0 * trained
    if stage == 0:
        return 0.0, steps * 2.0 * trained
    reductions = passes if stage == 2 else steps
    return 0.0, reductions * 2.0 * trained + steps * trained


def _gather_seconds(role: Role, cluster: Cluster) -> float:
    """Seconds in which a forward pass gathers the weights of a model in shards."""
    if role.engine is None or role.engine.zero_stage != 3:
        return 0.0
    size = (role.counted.base + role.counted.adapters) * role.shape.dtype.itemsize
    return cluster.ring_seconds(size, near_shards(role.engine, cluster.ranks))


def _scoring(
    name: str,
    role: Role,
    matrices: Matrices,
    rows: int,
    tokens: float,
    passes: int,
    cluster: Cluster,
) -> Part:
    """Forward passes alone."""
    flops = passes * forward_flops(matrices, tokens, rows * causal_pairs(tokens / rows), tokens)
    sends = passes * _gather_seconds(role, cluster)
    return Part(name, flops, cluster.compute_seconds(flops, role.shape.dtype) + sends, sends)


def _ppo_parts(
    settings: RLHFSettings,
    memory: MemoryPlan,
    configs: Mapping[str, PretrainedConfig],
    cluster: Cluster,
) -> list[Part] | None:
    """Rollout, scoring by every role, updates of an iteration."""
    ppo = settings.ppo
    counted = {n: Matrices.of(r.module, r.shape.config) for n, r in memory.roles.items()}
    if any(matrices is None for matrices in counted.values()):
        return None
    matrices = {name: found for name, found in counted.items() if found is not None}
    length = settings.max_seq_len
    answers = (
        settings.batches_per_iteration
        * ppo.per_device_generation_batch_size
        * ppo.answers_per_prompt
    )
    rows = min(ppo.per_device_training_batch_size, answers)
    passes, tokens = -(-answers // rows), float(rows * length)
    parts = [_rollout(settings, memory.roles["actor"], matrices["actor"], answers, cluster)]
    scored = ["actor", "reference" if "reference" in memory.roles else "actor"]
    if "critic" in memory.roles:
        scored.append("critic")
    if "reward" in memory.roles:
        scored.append("reward")
    elif "critic" in memory.roles:
        scored.append("critic")  # with its adapters off
    each = [
        _scoring(n, memory.roles[n], matrices[n], rows, tokens, passes, cluster) for n in scored
    ]
    parts.append(
        Part(
            "scoring",
            sum(part.flops for part in each),
            sum(part.seconds for part in each),
            sum(part.sends for part in each),
        )
    )
    for name in ("actor", "critic"):
        if name in memory.roles:
            many = passes * ppo.ppo_epochs
            batch = (rows, tokens)
            role = memory.roles[name]
            parts.append(
                _training(name, role, matrices[name], batch, many, settings.updates, cluster)
            )
    return parts


def _rollout(
    settings: RLHFSettings, actor: Role, matrices: Matrices, answers: int, cluster: Cluster
) -> Part:
    """Decoding token by token: weights and cache are read for each, by kernels that start alone."""
    ppo, config = settings.ppo, actor.shape.config.get_text_config()
    new, prompt = ppo.sampling.max_answer_seq_len, settings.max_prompt_seq_len
    rows = min(ppo.chunk_rows(ppo.answers_per_prompt), answers)
    chunks = -(-answers // rows)
    weights = actor.counted.weights(str(actor.engine.dtype)) if actor.engine else 0.0
    layers = config.num_hidden_layers
    cache = cache_bytes(config, actor.shape.dtype) * rows * (prompt + new / 2)
    flops = forward_flops(matrices, rows, rows * (prompt + new / 2), rows)
    read = cluster.read_seconds(weights + cache)
    step = max(read, cluster.compute_seconds(flops, actor.shape.dtype), LAUNCH * layers)
    is_whole = settings.rollouts.gather_for_rollouts
    gathers = settings.batches_per_iteration if is_whole else chunks * new
    sends = gathers * _gather_seconds(actor, cluster)
    tokens = float(rows * prompt)
    start = forward_flops(matrices, tokens, rows * causal_pairs(prompt), rows)
    first = cluster.compute_seconds(start, actor.shape.dtype)
    seconds = chunks * (first + new * step) + sends
    return Part("rollout", chunks * (start + new * flops), seconds, sends)
