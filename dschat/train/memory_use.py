"""What training passes take on a GPU beyond what their engines hold, and what would save of it."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.lazy import torch

GIB = 2**30


@dataclass(frozen=True)
class Passes:
    """Passes of an engine as it was built.

    Attributes:
        role: actor or critic in step 3, else empty. rows: of a micro-batch.
        held: bytes on the device by then.
    """

    role: str
    rows: int
    checkpointing: bool
    held: int


_built: list[Passes] = []


def note_engine(role: str, rows: int, checkpointing: bool) -> None:
    """Note an engine that has just been built in this process."""
    _built.append(Passes(role, rows, checkpointing, allocated()))


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    """Most bytes of tensors on the GPU so far; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def savings() -> str | None:
    """Say which flags would save how much, by the peak so far; None without engine or GPU.

    What passes add grows with the rows of a micro-batch; recomputation keeps one layer of it and
    what stands between layers.
    """
    if not _built or peak() <= _built[-1].held:
        return None
    last = _built[-1]
    added = (peak() - last.held) / GIB
    flag = "training" if last.role else "train"
    parts = []
    if last.rows > 1:
        fewer = last.rows // 2
        parts.append(
            f"--per_device_{flag}_batch_size {fewer} with more --gradient_accumulation_steps saves "
            f"about {added * (1 - fewer / last.rows):.1f} GiB"
        )
    for engine in _built:
        if not engine.checkpointing:
            prefix = f"{engine.role}_" if engine.role else ""
            parts.append(f"--{prefix}gradient_checkpointing saves most of what its passes keep")
    if last.role:
        parts.append("a smaller --generation_chunk_size saves in generation alone")
    parts.append("a higher ZeRO stage shards the rest")
    return (
        f"{last.held / GIB:.1f} GiB were held when it was set up, and passes of {last.rows} "
        f"rows added up to {added:.1f} GiB: {', '.join(parts)}"
    )
