"""Bytes of model states in PPO, role by role, from shapes alone: `ppo_memory.py --table`.

Weights, gradients and optimizer of what trains, and frozen weights; activations, the cache of
generation and buffers of communication come on top. Nothing is allocated: models are built on
`meta` from the planner's configurations (dschat/plan/shapes.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dschat.models.config import build_causal_lm
from dschat.models.reward_model import RewardModel
from dschat.plan.shapes import config_of
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig

GIB = 2**30
LAYOUTS = ("full", "none", "auto", "all")
TITLES = {
    "full": "all weights train",
    "none": "LoRA, four copies",
    "auto": "LoRA, two trunks",
    "all": "LoRA, one trunk",
}
# Bytes of a parameter: weight, gradient, optimizer. DeepSpeed keeps an fp32 master beside bf16 and
# fp16 weights; Adam keeps two moments in fp32.
BYTES = {"bf16": (2, 2, 12), "fp16": (2, 2, 12), "fp32": (4, 4, 8)}


OPT_350M, LLAMA_2, LLAMA_3 = map(config_of, ("opt-350m", "llama-2-7b", "llama-3-8b"))
# name: configurations of actor and critic
PAIRS: dict[str, tuple[PretrainedConfig, PretrainedConfig]] = {
    "OPT-1.3B, critic 350M": (config_of("opt-1.3b"), OPT_350M),
    "OPT-6.7B, critic 350M": (config_of("opt-6.7b"), OPT_350M),
    "Llama-2-7B, critic 7B": (LLAMA_2, LLAMA_2),
    "Llama-3-8B, critic 8B": (LLAMA_3, LLAMA_3),
}


@dataclass(frozen=True)
class Options:
    """Precision, sharding and adapters of the roles."""

    dtype: str = "bf16"
    zero_stage: int = 0
    ranks: int = 1
    lora: LoraConfig = LoraConfig(lora_dim=16)


@dataclass(frozen=True)
class States:
    """Bytes on one rank."""

    weights: float = 0.0  # of what trains
    gradients: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.frozen


NO_LORA = LoraConfig()


@dataclass(frozen=True)
class Count:
    """Parameters of one model: those that train, and those that do not."""

    trained: int
    frozen: int


def count(config: PretrainedConfig, lora: LoraConfig, *, critic: bool) -> Count:
    """A model's parameters, tied ones once; an actor has an output head, a critic a value head."""
    with torch.device("meta"):
        model: nn.Module = build_causal_lm(config)
        if critic:
            model = RewardModel(model.base_model)
        if lora.lora_dim:
            convert_linear_layer_to_lora(model, lora)
            only_optimize_lora_parameters(model, lora.modules_to_save)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Count(trained, sum(p.numel() for p in model.parameters()) - trained)


def states(
    actor: PretrainedConfig, critic: PretrainedConfig, layout: str, options: Options
) -> dict[str, States]:
    """Every role's states on one rank; a role that is another with its adapters off has none.

    With `all` the critic is an adapter on the actor's base (the adapters of the folders that both
    started from, which stay apart, are left out).
    """
    lora = NO_LORA if layout == "full" else options.lora
    counts = {
        "actor": count(actor, lora, critic=False),
        "critic": count(critic, lora, critic=True),
    }
    copied = layout in ("full", "none")
    of_actor, of_critic = (c.trained + c.frozen for c in counts.values())
    if not copied:
        reward_head = count(critic, NO_LORA, critic=True).trained - _trunk(critic)
        of_actor, of_critic = 0, reward_head
    elif lora.lora_dim:  # the copies carry no adapters
        of_actor = count(actor, NO_LORA, critic=False).trained
        of_critic = count(critic, NO_LORA, critic=True).trained
    roles = {name: _trained(c, options) for name, c in counts.items()}
    if layout == "all":
        roles["critic"] = _trained(Count(counts["critic"].trained, 0), options)
    frozen = {"reference": of_actor, "reward": of_critic}
    return roles | {name: _trained(Count(0, n), options) for name, n in frozen.items()}


def _trunk(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_causal_lm(config).base_model.parameters())


def _trained(counted: Count, options: Options) -> States:
    """ZeRO 1 shards the optimizer, 2 the gradients as well, 3 the weights as well."""
    weight, gradient, optimizer = BYTES[options.dtype]
    # As the training engines run: half precision at stage 0 is stage 1.
    stage = max(options.zero_stage, 1 if options.dtype != "fp32" else 0)
    shares = [options.ranks if stage >= least else 1 for least in (3, 2, 1)]
    return States(
        weights=counted.trained * weight / shares[0],
        gradients=counted.trained * gradient / shares[1],
        optimizer=counted.trained * optimizer / shares[2],
        frozen=counted.frozen * weight / shares[0],
    )


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
                for part in ("weights", "gradients", "optimizer")
            )
            cells = [name, TITLES[layout], *(f"{x:.2f}" for x in order)]
            cells += [" + ".join(f"{x:.2f}" for x in parts), f"{total:.2f}"]
            cells.append("yes" if total <= 0.9 * gpu_gib else "no")
            lines.append("| " + " | ".join(cells) + " |")
    return lines
