"""What a step needs on each GPU: held by its roles, and in each of its phases on top of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn
from transformers import PretrainedConfig

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.models.config import Build, build_causal_lm, set_dropout
from dschat.models.reward_model import RewardModel
from dschat.plan import passes
from dschat.plan.fake_step import ACTIVATIONS, LOGITS, Shape, needed, without_weights
from dschat.plan.passes import Pass
from dschat.plan.states import (
    ADAPTERS,
    BUCKETS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Bytes,
    Counted,
    States,
    adapted_sizes,
    engine_states,
    frozen_states,
)
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig
from dschat.train.engine import torch_dtype
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig

CACHE, MARGIN = "cache", "margin"
GENERATION, SCORING = "generation", "scoring"  # phases
KINDS = (*(WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, CACHE, BUCKETS, MARGIN),)
GIB = 2**30
# Beside tensors: CUDA's context, cuBLAS' workspace, NCCL's buffers; and what the allocator cannot
# reuse, as a share of the tensors. Assumptions, not measured here.
CONTEXT, FRAGMENTATION = 0.75 * GIB, 0.05
SAMPLER_COPIES = 6  # (rows, vocabulary) in fp32, of one decoding step

AnySettings = SFTSettings | RewardSettings | DPOSettings | RLHFSettings


@dataclass(frozen=True)
class Role:
    """One model of a step: its shape, its parameters, what it holds on a rank.

    Attributes:
        engine: of a role that trains; None for one that only scores.
    """

    shape: Shape
    states: States
    counted: Counted
    module: nn.Module  # on `meta`
    engine: EngineConfig | None = None


@dataclass(frozen=True)
class Phase:
    """One part of a step, and what it needs beside what is held."""

    name: str
    needs: Bytes

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.needs.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    roles: Mapping[str, Role]
    phases: tuple[Phase, ...]

    @property
    def held(self) -> dict[str, Bytes]:
        """By role and kind, always."""
        return {name: role.states.held for name, role in self.roles.items()}

    @cached_property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def tensors(self) -> float:
        """Bytes of all tensors in the worst phase."""
        return self.worst.total + sum(sum(kinds.values()) for kinds in self.held.values())

    @property
    def margin(self) -> float:
        """Bytes beside tensors."""
        return CONTEXT + FRAGMENTATION * self.tensors

    @property
    def total(self) -> float:
        """Bytes that the step needs."""
        return self.tensors + self.margin

    def of_kind(self, kind: str) -> float:
        """Bytes of a kind in the worst phase, over all roles."""
        if kind == MARGIN:
            return self.margin
        held = sum(kinds.get(kind, 0.0) for kinds in self.held.values())
        return held + self.worst.needs.get(kind, 0.0)


def plan_memory(
    settings: AnySettings, configs: Mapping[str, PretrainedConfig], dtype: str, ranks: int
) -> MemoryPlan:
    """Plan a step of these settings.

    Args:
        configs: of `model`, or of `actor` and, where it has them, `critic` and `reward`.
        dtype: fp32, bf16 or fp16. ranks: of the run, on all machines.
    """
    if isinstance(settings, RLHFSettings):
        return _plan_ppo(settings, configs, dtype, ranks)
    build: Build = build_causal_lm
    if isinstance(settings, RewardSettings):
        build = RewardModel.from_config
    engine = settings.run.engine_config(
        settings.model, dtype, settings.batch.per_device_train_batch_size
    )
    model = settings.run.complete(settings.model)
    role = trained_role(configs["model"], build, model, engine, ranks)
    return MemoryPlan({"model": role}, training_phases("training", role, training_pass(settings)))


def training_pass(settings: SFTSettings | RewardSettings | DPOSettings) -> Pass:
    """The pass of a micro-batch whose rows are all of full length."""
    batch = settings.batch
    rows, length = batch.per_device_train_batch_size, batch.max_seq_len
    sequences = 1 if isinstance(settings, SFTSettings) else 2
    if batch.max_tokens_per_batch is not None:
        rows = batch.max_tokens_per_batch // (sequences * length)
    if isinstance(settings, SFTSettings):
        return passes.sft_pass(rows, length)
    if isinstance(settings, RewardSettings):
        return passes.reward_pass(rows, length)
    return passes.preference_pass(rows, length)


def trained_role(
    config: PretrainedConfig,
    build: Build,
    model: ModelConfig,
    engine: EngineConfig,
    ranks: int,
    *,
    is_policy: bool = False,
) -> Role:
    """Count a model that trains."""
    if model.dropout is not None:
        set_dropout(config, model.dropout)
    shape = Shape(config, build, model, torch_dtype(engine.dtype), is_policy)
    module = without_weights(shape)
    counted = Counted.of(module, model.lora)
    return Role(shape, engine_states(counted, engine, ranks), counted, module, engine)


def training_phases(name: str, role: Role, made: Pass) -> tuple[Phase, ...]:
    """Both ends of the backward pass of a micro-batch, and the optimizer step."""
    states, found = role.states, needed(role.shape, made)
    unpacked = role.counted.unpacked * role.shape.dtype.itemsize  # the weight of a packed layer
    at_peak = found.at_peak | {ACTIVATIONS: found.at_peak[ACTIVATIONS] + unpacked}
    of_a_layer = {ACTIVATIONS: max(found.total - found.left, 0.0) + unpacked}
    return (
        Phase(name, at_peak | states.at_start),
        Phase(f"{name}, its end", of_a_layer | states.at_end),
        Phase(f"{name}, optimizer", states.in_step),
    )


def _plan_ppo(
    settings: RLHFSettings, configs: Mapping[str, PretrainedConfig], dtype: str, ranks: int
) -> MemoryPlan:
    ppo, setup = settings.ppo, settings.role_setup(dtype, iterations=1)
    lengths = settings.max_prompt_seq_len, ppo.sampling.max_answer_seq_len
    rows = ppo.per_device_training_batch_size

    def of(role: RoleConfig, name: str, build: Build) -> Role:
        return trained_role(configs[name], build, role.config, role.engine, ranks, is_policy=True)

    actor = of(setup.actor, "actor", build_causal_lm)
    roles = {"actor": actor}
    phases = [*_generation(settings, actor)]
    scoring = needed(actor.shape, passes.scoring_pass(rows, *lengths)).at_peak
    phases += training_phases("actor", actor, passes.actor_pass(rows, *lengths))
    if settings.ptx.unsupervised_dataset_name is not None:
        text = passes.actor_pass(rows, 1, sum(lengths) - 1)
        phases += training_phases("mixed-in text", actor, text)
    if setup.critic is not None:
        critic = of(setup.critic, "critic", RewardModel.from_config)
        if setup.share_trunk == "all":  # its weights are the actor's
            critic = replace(critic, states=_without_base(critic.states))
        roles["critic"] = critic
        phases += training_phases("critic", critic, passes.critic_pass(rows, *lengths))
    frozen: dict[str, tuple[PretrainedConfig, Build, FrozenConfig]] = {}
    if not setup.reference_is_actors:
        frozen["reference"] = configs["actor"], build_causal_lm, setup.reference
    if setup.reward is not None and not setup.reward_is_critics:
        config = configs.get("reward", configs.get("critic"))
        assert config is not None
        frozen["reward"] = config, RewardModel.from_config, setup.reward
    moved = 0.0
    for name, (config, build_frozen, role) in frozen.items():
        shape = Shape(config, build_frozen, ModelConfig(), torch_dtype(dtype), is_policy=True)
        module = without_weights(shape)
        counted, sharded = Counted.of(module, shape.model.lora), role.zero_stage == 3
        states = frozen_states(counted, dtype, ranks, sharded=sharded)
        if setup.share_trunk == "all":
            states = _without_base(states)
        elif role.offload:  # on the device for its own pass alone
            moved = max(moved, states.held[WEIGHTS])
            states = _without_base(states)
        roles[name] = Role(shape, states, counted, module)
    phases.append(Phase(SCORING, {WEIGHTS: moved} | scoring))
    return MemoryPlan(roles, tuple(phases))


def _without_base(states: States) -> States:
    return replace(states, held=states.held | {WEIGHTS: 0.0})


def _generation(settings: RLHFSettings, actor: Role) -> tuple[Phase, ...]:
    """Sampling of one chunk of rows: the cache of full answers, one layer of it twice."""
    ppo, config = settings.ppo, actor.shape.config.get_text_config()
    rows = ppo.chunk_rows(ppo.answers_per_prompt)
    prompt, answer = settings.max_prompt_seq_len, ppo.sampling.max_answer_seq_len
    cache = needed(actor.shape, passes.prefill_pass(rows, prompt + answer)).left
    started = needed(actor.shape, passes.prefill_pass(rows, prompt))
    sampling = SAMPLER_COPIES * 4.0 * rows * config.vocab_size
    growing = cache / config.num_hidden_layers  # the new cache of a layer beside its old one
    needs = {
        CACHE: cache + growing,
        ACTIVATIONS: max(started.total - started.left - growing, 0.0),
        LOGITS: sampling,
    }
    if settings.fuse_lora_for_generation:
        needs[WEIGHTS] = float(sum(adapted_sizes(actor.module)) * actor.shape.dtype.itemsize)
    return (Phase(GENERATION, needs),)
