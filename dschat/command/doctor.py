"""Check whether this machine can train: a line for each thing, `ok`, or what to do about it.

    dschat doctor

Versions against those that this release is tested with, GPUs, NCCL between them, room on the disks,
compilers, and ten seconds of training on the embedded model. Ends with 1 where something is to do.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dschat.command import training_check
from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.data.cache import own_folder
from dschat.errors import UserError, brief
from dschat.lazy import torch
from dschat.utils.files import free_bytes, in_words
from dschat.utils.printable import printable

LITTLE_ROOM = 10 * 10**9  # bytes: a model of a billion weights with one checkpoint and its data
LABELS = {True: "ok", False: "to do"}


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` says what to do, None where nothing is."""

    subject: str
    found: str
    remedy: str | None = None

    def lines(self, width: int) -> list[str]:
        """Format it for a window of so many columns."""
        text = f"{self.subject}: {self.found}"
        if self.remedy is not None:
            text += f"; {self.remedy}"
        label = f"{LABELS[self.remedy is None]:<7}"
        return textwrap.wrap(
            printable(text, keep=""), width, initial_indent=label, subsequent_indent=" " * 7
        )


def versions() -> Iterator[Finding]:
    """Compare what is installed with the ranges that the package declares."""
    from importlib import metadata

    from packaging.requirements import Requirement

    yield Finding("python", sys.version.split()[0])
    try:
        declared = metadata.requires("dschat") or []
    except metadata.PackageNotFoundError:
        yield Finding("versions", "dschat is not installed", "run: pip install -e .")
        return
    fitting = []
    for wanted in map(Requirement, declared):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            present = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            present = "missing"
        if present != "missing" and wanted.specifier.contains(present, prereleases=True):
            fitting.append(f"{wanted.name} {present}")
        else:
            remedy = f'run: pip install "{wanted.name}{wanted.specifier}"'
            yield Finding(wanted.name, f"{present}, tested with {wanted.specifier}", remedy)
    yield Finding("versions", ", ".join(fitting))


def gpus() -> Iterator[Finding]:
    """List the GPUs that torch can use, and whether it misses one that is there."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            kinds = "bf16" if torch.cuda.is_bf16_supported() else "fp16, no bf16"
            memory = in_words(properties.total_memory)
            yield Finding(f"GPU {number}", f"{properties.name}, {memory}, {kinds}")
    elif shutil.which("nvidia-smi"):
        build = torch.version.cuda or "none: a build for the CPU"
        yield Finding(
            "GPU",
            f"nvidia-smi is there, and torch {torch.__version__} (CUDA {build}) sees no GPU",
            "compare the driver's CUDA version in nvidia-smi with torch's, and install the build "
            "for it from pytorch.org",
        )
    else:
        yield Finding("GPU", "none; training runs on the CPU")


def nccl() -> Iterator[Finding]:
    """Add up a number over all GPUs."""
    if not torch.cuda.is_available():
        yield Finding("NCCL", "not needed without a GPU")
        return
    count = torch.cuda.device_count()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    problem = training_check.sum_over_gpus(count)
    remedy = None
    if problem is not None:
        remedy = "set NCCL_DEBUG=INFO and run dschat doctor again; docs/troubleshooting.md has more"
    yield Finding("NCCL", f"{version}, a sum over {count}: {problem or 'right'}", remedy)


def disks() -> Iterator[Finding]:
    """Find the room where runs write, and where data and models are cached."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, other in (
        ("this folder", Path.cwd(), "start in a folder that can be"),
        ("cache of data", own_folder(), "set XDG_CACHE_HOME to a folder that can be"),
        ("cache of models", Path(HF_HUB_CACHE), "set HF_HOME to a folder that can be"),
    ):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(there, os.W_OK):
            yield Finding(name, f"{there} cannot be written to", other)
            continue
        free = free_bytes(folder)
        remedy = None if free >= LITTLE_ROOM else f"free some of the disk of {folder}"
        yield Finding(name, f"{in_words(free)} free", remedy)


def compilers() -> Iterator[Finding]:
    """Look for what DeepSpeed compiles its kernels with when they are first used."""
    missing = [name for name in ("c++", "ninja") if shutil.which(name) is None]
    if missing:
        remedy = "install g++ and ninja: DeepSpeed compiles the optimizer of --offload with them"
        yield Finding("compilers", f"no {' and no '.join(missing)}", remedy)
        return
    from torch.utils.cpp_extension import CUDA_HOME

    text = "c++, ninja"
    if torch.cuda.is_available():
        text += f", nvcc of {CUDA_HOME}" if CUDA_HOME else "; no nvcc, which --offload needs"
    yield Finding("compilers", text)


def training() -> Iterator[Finding]:
    """Train the embedded model for some seconds."""
    result = training_check.train()
    quickstart = "run the quickstart to see all of it: dschat run quickstart"
    remedy = None if result.learned else quickstart
    yield Finding("training", result.text, remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...]
CHECKS = (versions, gpus, nccl, disks, compilers, training)


def findings() -> Iterator[Finding]:
    """Yield what all checks find; what a check itself fails on is a finding too.

    Raises:
        UserError: the present folder is gone, in which nothing can be checked.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the present folder is gone; cd to another and try again") from error
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # of a package that is broken
            found = f"cannot be checked: {brief(error, with_type=True)}"
            remedy = (
                "install the package that this is about again; docs/troubleshooting.md has more"
            )
            yield Finding(check.__name__, found, remedy)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the findings as they come."""
    OneLineParser(__doc__, prog=program("dschat.command.doctor")).parse_args(argv)
    width, to_do = shutil.get_terminal_size().columns, 0
    for finding in findings():
        to_do += finding.remedy is not None
        print("\n".join(finding.lines(width)), flush=True)
    if to_do:
        print(f"{to_do} to do")
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
