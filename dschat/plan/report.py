"""A plan as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dschat.plan.remedies import Remedy
from dschat.plan.roles import CONTEXT, FRAGMENTATION, GIB, KINDS, MARGIN, MemoryPlan
from dschat.plan.speed import COMPUTE, LINK, MEMORY, Cluster, Part
from dschat.utils.printable import printable


@dataclass(frozen=True)
class Plan:
    """All that is said about one step.

    Attributes:
        title: the recipe and its models. memory_of_gpu: bytes. unit: what the parts are of.
    """

    title: str
    unit: str
    dtype: str
    memory: MemoryPlan
    memory_of_gpu: float
    cluster: Cluster
    parts: list[Part] | None
    remedies: list[Remedy]
    largest_micro_batch: int | None
    usd_per_gpu_hour: float | None = None

    @property
    def fits(self) -> bool:
        """Return whether the step fits a GPU."""
        return self.memory.total <= self.memory_of_gpu

    @property
    def seconds(self) -> float | None:
        """Seconds of a step."""
        return None if self.parts is None else sum(part.seconds for part in self.parts)

    @property
    def usd(self) -> float | None:
        """Cost of a step on all GPUs."""
        if self.seconds is None or self.usd_per_gpu_hour is None:
            return None
        return self.seconds * self.cluster.ranks * self.usd_per_gpu_hour / 3600


def verdict(memory: MemoryPlan, memory_of_gpu: float) -> str:
    """One line: what is needed, and what would be left."""
    total, spare = memory.total / GIB, (memory_of_gpu - memory.total) / GIB
    left = f"{spare:.1f} spare" if spare >= 0 else f"{-spare:.1f} too many"
    return f"{total:.1f} of {memory_of_gpu / GIB:.1f} GiB, {left}; most in {memory.worst.name}"


def text(plan: Plan) -> str:
    """A page for a terminal."""
    return printable("\n".join(_lines(plan)), keep="\n")


def _lines(plan: Plan) -> Iterator[str]:
    gpus = f"{plan.cluster.ranks} x {plan.cluster.gpu.name}"
    nodes = f" on {plan.cluster.nodes} nodes" if plan.cluster.nodes > 1 else ""
    yield f"{plan.title}, {plan.dtype}, {gpus}{nodes}"
    fits = "fits" if plan.fits else "does not fit"
    yield f"{fits}: {verdict(plan.memory, plan.memory_of_gpu)}"
    yield ""
    yield from table(plan.memory)
    yield ""
    for phase in plan.memory.phases:
        parts = [f"{k} {v / GIB:.2f}" for k, v in phase.needs.items() if v / GIB >= 0.005]
        yield f"{phase.name}: {', '.join(parts) or 'nothing more'}"
    yield ""
    if plan.largest_micro_batch:
        yield f"largest training micro-batch: about {plan.largest_micro_batch} rows"
    for remedy in plan.remedies:
        yield (
            f"{remedy.change}: {remedy.saved / GIB:.1f} GiB less, {remedy.total / GIB:.1f} needed"
        )
    if not plan.fits and (not plan.remedies or plan.remedies[-1].total > plan.memory_of_gpu):
        yield "no setting makes it fit: take more or larger GPUs, or a smaller model"
    yield from _time_lines(plan)


def table(memory: MemoryPlan) -> list[str]:
    """Markdown of GiB on each GPU: roles, then the worst phase, by kind."""
    kinds = [kind for kind in KINDS if memory.of_kind(kind) / GIB >= 0.005]
    rows = [(name, states) for name, states in memory.held.items()]
    rows.append((f"in {memory.worst.name}", memory.worst.needs))
    rows.append(("beside tensors", {MARGIN: memory.margin}))
    lines = [f"| GiB a GPU | {' | '.join(kinds)} | all |", "| --- " * (len(kinds) + 2) + "|"]
    for name, found in rows:
        cells = [f"{found.get(kind, 0.0) / GIB:.2f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(found.values()) / GIB:.2f} |")
    sums = [f"{memory.of_kind(kind) / GIB:.2f}" for kind in kinds]
    return [*lines, f"| all | {' | '.join(sums)} | {memory.total / GIB:.2f} |"]


def _time_lines(plan: Plan) -> Iterator[str]:
    if plan.parts is None or plan.seconds is None:
        yield "time: not computed, there is no exact count of this model's operations"
        return
    parts = ", ".join(
        f"{p.name} {p.seconds:.2f} s" + (f" ({p.sends:.2f} sending)" if p.sends >= 0.005 else "")
        for p in plan.parts
    )
    flops = sum(part.flops for part in plan.parts)
    yield f"{plan.unit}: {plan.seconds:.2f} s, {flops / 1e12:.1f} TFLOPs a GPU; {parts}"
    if plan.usd is not None:
        yield f"cost: {plan.usd:.4f} USD at {plan.usd_per_gpu_hour:g} a GPU and hour"
    yield (
        f"assumed, not measured: {plan.cluster.compute:.0%} of the peak in training, "
        f"{MEMORY:.0%} of the memory's bandwidth in decoding, {LINK:.0%} of the links', rows of "
        f"full length; {CONTEXT / GIB:g} GiB and {FRAGMENTATION:.0%} beside tensors"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for a program; sizes in bytes."""
    return {
        "title": plan.title,
        "dtype": plan.dtype,
        "gpu": plan.cluster.gpu.name,
        "gpus": plan.cluster.ranks,
        "nodes": plan.cluster.nodes,
        "fits": plan.fits,
        "total": plan.memory.total,
        "memory_of_gpu": plan.memory_of_gpu,
        "held": plan.memory.held,
        "phases": {phase.name: phase.needs for phase in plan.memory.phases},
        "worst_phase": plan.memory.worst.name,
        "by_kind": {kind: plan.memory.of_kind(kind) for kind in KINDS},
        "largest_micro_batch": plan.largest_micro_batch,
        "remedies": [vars(remedy) for remedy in plan.remedies],
        "parts": None if plan.parts is None else [vars(part) for part in plan.parts],
        "seconds": plan.seconds,
        "usd": plan.usd,
        "assumed": {"compute": COMPUTE, "memory": MEMORY, "link": LINK},
    }
