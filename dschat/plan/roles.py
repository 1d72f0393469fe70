"""Roles of a step and its phases: what a model holds on a GPU, and what its passes add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PretrainedConfig

from dschat.models.config import Build, set_dropout
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
    engine_states,
)
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
