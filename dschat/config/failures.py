"""Failures outside the program, each as one line: memory, a disk, a closed output, a lost rank."""

from __future__ import annotations

import errno
import os
import select
import sys
from pathlib import Path

from dschat.lazy import torch
from dschat.train import memory_use, run_lock
from dschat.train.checkpoint_folder import last_good
from dschat.train.metrics import StepBar
from dschat.utils.files import OF_DISKS, disk_error
from dschat.utils.waiting import LostRankError

_REFUSED = (errno.EACCES, errno.EPERM)  # of a file or folder, such as a home or a temporary one
_LESS_MEMORY = (
    "lower the micro-batch (--per_device_train_batch_size; in step 3 --per_device_training_batch_"
    "size and --generation_chunk_size) and raise --gradient_accumulation_steps by the same factor, "
    "or add --gradient_checkpointing or a higher --zero_stage"
)


def line_for(error: BaseException) -> str | None:
    """Describe such a failure in one line, with the step; None for any other error."""
    place = "before the first step" if StepBar.made is None else f"step {StepBar.made + 1}"
    if (what := _memory(error)) is not None:
        less = memory_use.savings() or _LESS_MEMORY
        return f"{place}: out of {what}; {less}; docs/troubleshooting.md has more"
    if isinstance(error, LostRankError):
        return f"{place}: {error}"
    if isinstance(error, BrokenPipeError) and _output_is_closed():
        return (
            f"{place}: nobody reads its standard output any more; write it to a file, and start "
            "again with --resume"
        )
    found = disk_error(error)
    refused = found is not None and found.errno in _REFUSED and found.filename is not None
    if found is not None and (refused or found.errno in OF_DISKS):
        path = found.filename or _broken_stream()
        remedies = [last_good(folder) for folder in run_lock.held()]
        first = "let this user have it" if refused else "free some space"
        remedy = next(iter(remedies), f"{first}, and start again with --resume")
        return f"{place}: {f'{path}: ' if path else ''}{found.strerror}; {remedy}"
    return None


def _broken_stream() -> str | None:
    """Name the first standard stream that cannot be written to; later writes to it do not fail.

    Those to standard error then go to standard output, or nowhere if that is broken too.
    """
    streams = {1: "standard output", 2: "standard error"}
    broken = [number for number in streams if not _takes_more(number)]
    if not broken:
        return None
    target = Path(f"/proc/self/fd/{broken[0]}")
    name = f"{streams[broken[0]]} ({os.readlink(target)})" if target.is_symlink() else ""
    other = os.open(os.devnull, os.O_WRONLY) if 1 in broken else 1
    for number in broken:
        os.dup2(other, number)
    return name or streams[broken[0]]


def _takes_more(descriptor: int) -> bool:
    """Test with an empty line: what Python buffers of a failed write may not fail again."""
    try:
        os.write(descriptor, b"\n")
    except OSError:
        return False
    return True


def _memory(error: BaseException) -> str | None:
    """Name the memory that ran out: torch has an error for a device's, a text for the CPU's."""
    if isinstance(error, torch.OutOfMemoryError):
        return "memory on the device"
    is_cpus = "DefaultCPUAllocator" in str(error) and isinstance(error, RuntimeError)
    return "memory" if is_cpus or isinstance(error, MemoryError) else None


def _output_is_closed() -> bool:
    """Return whether standard output is a pipe without a reader; later writes then go nowhere."""
    poll, output = select.poll(), sys.stdout.fileno()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
