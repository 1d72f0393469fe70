"""What to change first where a step does not fit, and how many rows would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dschat.config import RLHFSettings
from dschat.errors import UserError
from dschat.plan.memory import AnySettings
from dschat.plan.roles import GENERATION, GIB, SCORING, MemoryPlan
from dschat.settings import flags_of, given_flags

Planned = Callable[[AnySettings], MemoryPlan]
LEAST = 0.05 * GIB  # a saving that is worth a line


@dataclass(frozen=True)
class Remedy:
    """A change of settings, on top of those before it, and what is needed after it."""

    change: str
    saved: float
    total: float


def changed(settings: AnySettings, **flags: Any) -> AnySettings:
    """Settings with some flags changed.

    Raises:
        UserError: they contradict the others.
    """
    given = {flag.name: flag.value(settings) for flag in given_flags(settings)}
    return type(settings).of(**(given | flags))


def remedies(settings: AnySettings, planned: Planned, memory: float, ranks: int) -> list[Remedy]:
    """Changes in the order of what they cost, each beside those before it, until the step fits.

    Args:
        planned: plans settings. memory: bytes of a GPU.
    """
    found: list[Remedy] = []
    total = planned(settings).total
    for _ in range(len(CHANGES) * 8):
        if total <= memory:
            break
        for flags in _changes(settings, ranks):
            try:
                next_settings = changed(settings, **flags)
            except UserError:
                continue
            after = planned(next_settings).total
            if total - after > LEAST:
                found.append(Remedy(_words(flags), total - after, after))
                settings, total = next_settings, after
                break
        else:
            break
    return found


def largest_micro_batch(settings: AnySettings, planned: Planned, memory: float) -> int | None:
    """Rows of a training micro-batch that still fit, by what twice as many rows as now need.

    Activations grow with the rows; the blocks of the head and what is held do not. None where
    batches are made by tokens.
    """
    if isinstance(settings, RLHFSettings):
        name, rows = "per_device_training_batch_size", settings.ppo.per_device_training_batch_size
    elif settings.batch.max_tokens_per_batch is not None:
        return None
    else:
        name, rows = "per_device_train_batch_size", settings.batch.per_device_train_batch_size
    now, twice = planned(settings), planned(changed(settings, **{name: 2 * rows}))
    slope = (_training(twice) - _training(now)) / rows
    if slope <= 0:
        return None
    return max(rows + int((memory - _training(now)) // slope), 0)


def _training(plan: MemoryPlan) -> float:
    """Bytes needed while training, whatever other phases need."""
    phases = tuple(p for p in plan.phases if p.name not in (GENERATION, SCORING))
    return replace(plan, phases=phases).total


def _words(flags: dict[str, Any]) -> str:
    whole = {True: "--{}", False: "no --{}"}
    return " ".join(
        whole[v].format(k) if isinstance(v, bool) else f"--{k} {v}" for k, v in flags.items()
    )


def _prefixes(settings: AnySettings) -> tuple[str, ...]:
    return ("actor_", "critic_") if isinstance(settings, RLHFSettings) else ("",)


def _value(settings: AnySettings, name: str) -> Any:
    return next(f for f in flags_of(type(settings)) if f.name == name).value(settings)


def _checkpointing(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    for prefix in _prefixes(settings):
        if not _value(settings, f"{prefix}gradient_checkpointing"):
            yield {f"{prefix}gradient_checkpointing": True}


def _rows(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    """A half of the rows at a time, or what divides them; the optimizer step stays what it is."""
    accumulated = settings.run.engine.gradient_accumulation_steps
    name = "per_device_train_batch_size"
    if isinstance(settings, RLHFSettings):
        name = "per_device_training_batch_size"
        chunk = settings.ppo.chunk_rows(settings.ppo.answers_per_prompt)
        if chunk > 1:
            yield {"generation_chunk_size": chunk // 2}
    elif settings.batch.max_tokens_per_batch is not None:
        return
    if (rows := _value(settings, name)) > 1:
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)
        yield {name: rows // parts, "gradient_accumulation_steps": parts * accumulated}


def _layer_by_layer(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    """Rollouts without further copies of weights."""
    if isinstance(settings, RLHFSettings):
        for name in ("fuse_lora_for_generation", "gather_for_rollouts"):
            if _value(settings, name):
                yield {name: False}


def _shards(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    stages = {p: _value(settings, f"{p}zero_stage") for p in _prefixes(settings)}
    lowest = min(stages.values())
    if ranks > 1 and lowest < 3:
        yield {f"{p}zero_stage": max(stage, 2 if lowest < 2 else 3) for p, stage in stages.items()}


def _offload(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    if isinstance(settings, RLHFSettings):
        for name in ("offload_reference_model", "offload_reward_model"):
            if not _value(settings, name):
                yield {name: True}
    if not settings.run.engine.offload:
        stages = {f"{p}zero_stage": _value(settings, f"{p}zero_stage") for p in _prefixes(settings)}
        yield {"offload": True} | {name: 1 for name, stage in stages.items() if stage == 0}


def _few_bits(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    for prefix in _prefixes(settings):
        if _value(settings, f"{prefix}lora_dim") and not _value(settings, f"{prefix}quantize_base"):
            yield {f"{prefix}quantize_base": "4bit"}


def _adapters(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    for prefix in _prefixes(settings):
        if not _value(settings, f"{prefix}lora_dim"):
            yield {f"{prefix}lora_dim": 16}


CHANGES = (_checkpointing, _rows, _layer_by_layer, _shards, _offload, _adapters, _few_bits)


def _changes(settings: AnySettings, ranks: int) -> Iterator[dict[str, Any]]:
    for kind in CHANGES:
        yield from kind(settings, ranks)
