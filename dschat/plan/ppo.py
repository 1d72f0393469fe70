"""Memory of step 3: its roles, the cache of generation, the passes of actor and critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from dschat.config import RLHFSettings
from dschat.models.config import Build, build_causal_lm
from dschat.models.reward_model import RewardModel
from dschat.plan import passes
from dschat.plan.fake_step import ACTIVATIONS, LOGITS, Shape, needed, without_weights
from dschat.plan.roles import (
    CACHE,
    GENERATION,
    SCORING,
    MemoryPlan,
    Phase,
    Role,
    trained_role,
    training_phases,
)
from dschat.plan.states import ADAPTERS, WEIGHTS, Counted, States, adapted_sizes, frozen_states
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig
from dschat.rlhf.static_rollout import LATE
from dschat.train.engine import torch_dtype
from dschat.train.model_config import ModelConfig
from dschat.utils.flops import layer_configs

SAMPLER_COPIES = 6  # (rows, vocabulary) in fp32, of one decoding step


def plan_ppo(
    settings: RLHFSettings, configs: Mapping[str, PretrainedConfig], dtype: str, ranks: int
) -> MemoryPlan:
    """Plan the roles and phases of step 3; `configs` are those of actor, critic and reward."""
    ppo, setup = settings.ppo, settings.role_setup(dtype, iterations=1)
    lengths = settings.max_prompt_seq_len, ppo.sampling.max_answer_seq_len
    rows = ppo.per_device_training_batch_size

    def of(role: RoleConfig, name: str, build: Build) -> Role:
        return trained_role(configs[name], build, role.config, role.engine, ranks, is_policy=True)

    actor = of(setup.actor, "actor", build_causal_lm)
    if setup.share_trunk == "all":
        actor = replace(actor, states=_with_start(actor.states))
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
            critic = replace(critic, states=_without_base(_with_start(critic.states)))
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


def _with_start(states: States) -> States:
    """On a trunk that others use too, the adapter that a role began from stays beside its own."""
    return replace(states, held=states.held | {ADAPTERS: 2 * states.held[ADAPTERS]})


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    numbers = 0
    for of_layer in layer_configs(config):
        heads = of_layer.num_attention_heads
        size = getattr(of_layer, "head_dim", None) or of_layer.hidden_size // heads
        numbers += 2 * (getattr(of_layer, "num_key_value_heads", None) or heads) * size
    return numbers * dtype.itemsize


def _generation(settings: RLHFSettings, actor: Role) -> tuple[Phase, ...]:
    """Sampling of one chunk of rows: the cache of full answers, one layer of it twice."""
    if settings.rollouts.rollout_engine == "vllm":
        return ()  # elsewhere
    ppo, config = settings.ppo, actor.shape.config.get_text_config()
    rows = ppo.chunk_rows(ppo.answers_per_prompt)
    prompt, answer = settings.max_prompt_seq_len, ppo.sampling.max_answer_seq_len
    cache = needed(actor.shape, passes.prefill_pass(rows, prompt + answer)).left
    if settings.rollouts.rollout_engine != "generate":  # its cache has all columns in every layer
        tokens = prompt + answer + LATE
        cache = max(cache, float(rows * tokens * cache_bytes(config, actor.shape.dtype)))
    started = needed(actor.shape, passes.prefill_pass(rows, prompt))
    sampling = SAMPLER_COPIES * 4.0 * rows * config.vocab_size
    growing = cache / config.num_hidden_layers  # the new cache of a layer beside its old one
    needs = {
        CACHE: cache + growing,
        ACTIVATIONS: max(started.total - started.left - growing, 0.0),
        LOGITS: sampling,
    }
    if settings.rollouts.fuse_lora_for_generation:
        needs[WEIGHTS] = float(sum(adapted_sizes(actor.module)) * actor.shape.dtype.itemsize)
    if settings.rollouts.gather_for_rollouts:
        whole = (actor.counted.base + actor.counted.adapters) * actor.shape.dtype.itemsize
        needs[WEIGHTS] = needs.get(WEIGHTS, 0.0) + whole
    return (Phase(GENERATION, needs),)
