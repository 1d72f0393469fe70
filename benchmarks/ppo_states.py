"""Bytes of model states in PPO, role by role, from shapes alone: `ppo_memory.py --table`.

The planner's arithmetic (dschat/plan/states.py) over layouts and models: weights, gradients and
optimizer of what trains, and frozen weights; activations, the cache of generation and buffers of
communication come on top. Nothing is allocated: models are built on `meta` from the planner's
configurations (dschat/plan/shapes.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from dschat.models.config import build_causal_lm
from dschat.models.reward_model import RewardModel
from dschat.plan.fake_step import Shape, without_weights
from dschat.plan.roles import GIB, trained_role
from dschat.plan.shapes import config_of
from dschat.plan.states import (
    ADAPTERS,
    BYTES,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Counted,
    frozen_states,
)
from dschat.train.engine import torch_dtype
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig

LAYOUTS = ("full", "none", "auto", "all")
TITLES = {
    "full": "all weights train",
    "none": "LoRA, four copies",
    "auto": "LoRA, two trunks",
    "all": "LoRA, one trunk",
}

OPT_350M, LLAMA_2, LLAMA_3 = map(config_of, ("opt-350m", "llama-2-7b", "llama-3-8b"))
# name: configurations of actor and critic
PAIRS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {
    "OPT-1.3B, critic 350M": (config_of("opt-1.3b"), OPT_350M),
    "OPT-6.7B, critic 350M": (config_of("opt-6.7b"), OPT_350M),
    "Llama-2-7B, critic 7B": (LLAMA_2, LLAMA_2),
    "Llama-3-8B, critic 8B": (LLAMA_3, LLAMA_3),
}
BUILDS = {"actor": build_causal_lm, "critic": RewardModel.from_config}


@dataclass(frozen=True)
class Options:
    """Precision, sharding and adapters of the roles."""

    dtype: str = "bf16"
    zero_stage: int = 0
    ranks: int = 1
    lora: LoraConfig = LoraConfig(lora_dim=16)


@dataclass(frozen=True)
class RoleStates:
    """Bytes of one role on one rank; `trained` are those of its weights that train."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    trained: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.optimizer


def states(
    actor: PretrainedConfig, critic: PretrainedConfig, layout: str, options: Options
) -> dict[str, RoleStates]:
    """Every role's states on one rank; a role that is another with its adapters off has none.

    With `all` the critic is an adapter on the actor's base (the adapters of the folders that both
    started from, which stay apart, are left out).
    """
    lora = LoraConfig() if layout == "full" else options.lora
    configs = {"actor": actor, "critic": critic}
    roles = {name: _trained(config, name, lora, options) for name, config in configs.items()}
    if layout == "all":
        roles["critic"] = replace(roles["critic"], weights=roles["critic"].trained)
    copied = layout in ("full", "none")
    for name, source in (("reference", "actor"), ("reward", "critic")):
        roles[name] = _frozen(configs[source], source, options) if copied else RoleStates()
    return roles


def _trained(config: PretrainedConfig, name: str, lora: LoraConfig, options: Options) -> RoleStates:
    engine = EngineConfig(zero_stage=options.zero_stage, micro_batch_size=1, dtype=options.dtype)
    role = trained_role(config, BUILDS[name], ModelConfig(lora=lora), engine, options.ranks)
    held, at_end = role.states.held, role.states.at_end
    sharded = options.ranks if options.zero_stage == 3 else 1
    return RoleStates(
        weights=held[WEIGHTS] + held[ADAPTERS],
        gradients=held.get(GRADIENTS, 0.0) + at_end.get(GRADIENTS, 0.0),
        optimizer=held[OPTIMIZER],
        trained=role.counted.trained * BYTES[options.dtype] / sharded,
    )


def _frozen(config: PretrainedConfig, name: str, options: Options) -> RoleStates:
    shape = Shape(config, BUILDS[name], ModelConfig(), torch_dtype(options.dtype))
    counted = Counted.of(without_weights(shape), LoraConfig())
    is_sharded = options.zero_stage == 3
    held = frozen_states(counted, options.dtype, options.ranks, sharded=is_sharded).held
    return RoleStates(weights=held[WEIGHTS])


def table(options: Options, gpu_gib: float) -> list[str]:
    """Lines of a Markdown table over all pairs and layouts; what leaves a tenth of a GPU fits."""
    sharded = f"ZeRO {options.zero_stage}, {options.ranks} ranks"
    lines = [
        f"GiB a rank, {options.dtype}, {sharded}, LoRA r = {options.lora.lora_dim} on "
        "all linear layers",
        "",
        "| models | layout | actor | reference | critic | reward | trained w + g + o | total "
        f"| fits {gpu_gib:g} GiB |",
        "| --- " * 9 + "|",
    ]
    for name, (actor, critic) in PAIRS.items():
        for layout in LAYOUTS:
            if layout == "all" and (actor is not critic or options.zero_stage == 3):
                continue  # no common base, or refused
            roles = states(actor, critic, layout, options)
            total = sum(s.total for s in roles.values()) / GIB
            order = [roles[r].total / GIB for r in ("actor", "reference", "critic", "reward")]
            parts = (
                sum(getattr(s, part) for s in roles.values()) / GIB
                for part in ("trained", "gradients", "optimizer")
            )
            cells = [name, TITLES[layout], *(f"{x:.2f}" for x in order)]
            cells += [" + ".join(f"{x:.2f}" for x in parts), f"{total:.2f}"]
            cells.append("yes" if total <= 0.9 * gpu_gib else "no")
            lines.append("| " + " | ".join(cells) + " |")
    return lines
