"""Every program on this machine's GPU: speed, MFU, bandwidth in decoding, memory by the plan.

    make gpu-day
    python -m benchmarks.gpu_day --folder build/gpu_day --cases sft "ppo opt"
    python -m benchmarks.gpu_day --tiny --cases sft       # on a CPU, to see that it works

First tests/gpu; then each case in a process of its own, on random weights of well-known shapes and
rows of nearly full length. FOLDER gets `gpu_day.json` and `gpu_day.md`. A figure is the median of
the steps after the first ones. The share of the memory's bandwidth counts the actor's weights read
once for each decoding step; caches come on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_day.cases import CASES, Case
from benchmarks.gpu_day.run import Figures, Machine, run_case

HEADERS = ("case", "tokens/s", "answer tokens/s", "MFU", "bandwidth", "peak GiB", "plan", "off")


def main() -> None:
    """Measure, and write the two files."""
    args = _parser().parse_args()
    machine = machine_of(args.folder, tiny=args.tiny)
    tests = None if args.tiny else run_tests()
    found: list[Figures] = []
    for case in chosen(args.cases, tiny=args.tiny):
        print(f"{case.name} ...", flush=True)
        found.append(run_case(case, machine))
        write(machine, tests, found)  # what is done stays, whatever comes
    print(page(machine, tests, found))


def machine_of(folder: Path, *, tiny: bool) -> Machine:
    """Look at the device.

    Raises:
        SystemExit: there is no GPU, and nobody asked for a CPU.
    """
    if tiny:
        return Machine(folder, None, "fp32", rows=2, length=64)
    if not torch.cuda.is_available():
        sys.exit("error: no GPU; --tiny runs tiny shapes on the CPU")
    name = torch.cuda.get_device_name()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Machine(folder, name, "bf16" if has_bf16 else "fp16")


def chosen(words: list[str], *, tiny: bool) -> list[Case]:
    """Cases whose names hold one of the words, all without words, and those that they build on."""
    wanted = [c for c in CASES if not words or any(word in c.name for word in words)]
    needed = {v.removeprefix("case:") for c in wanted for v in c.models.values()}
    cases = [c for c in CASES if c in wanted or c.name in needed]
    return [case.tiny() for case in cases] if tiny else cases


def run_tests() -> str:
    """Run tests/gpu; return its last line."""
    command = [sys.executable, "-m", "pytest", "--gpu", "tests/gpu", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def write(machine: Machine, tests: str | None, found: list[Figures]) -> None:
    """Write the figures as JSON and as a page."""
    record = {"device": machine.device or "CPU", "dtype": machine.dtype, "tests": tests}
    record |= {"torch": torch.__version__, "cases": [dataclasses.asdict(f) for f in found]}
    (machine.folder / "gpu_day.json").write_text(json.dumps(record, indent=1) + "\n")
    (machine.folder / "gpu_day.md").write_text(page(machine, tests, found) + "\n")


def page(machine: Machine, tests: str | None, found: list[Figures]) -> str:
    """One Markdown page: a row for each case."""
    lines = [f"# {machine.device or 'CPU'}, {machine.dtype}", ""]
    if tests is not None:
        lines += [f"tests/gpu: {tests}", ""]
    lines += ["| " + " | ".join(HEADERS) + " |", "| --- " * len(HEADERS) + "|"]
    for f in found:
        cells = [f.case, *_cells(f)] if f.error is None else [f.case, f"failed: {f.error}"]
        lines.append("| " + " | ".join(cells + [""] * (len(HEADERS) - len(cells))) + " |")
    return "\n".join(lines)


def _cells(f: Figures) -> list[str]:
    off = None if not (f.peak and f.planned) else f.planned / f.peak - 1
    speeds = [f.speeds.get(name) for name in ("tokens_per_s", "answer_tokens_per_s")]
    shares = [f.mfu, f.bandwidth]
    return [
        *("" if x is None else f"{x:,.0f}" for x in speeds),
        *("" if x is None else f"{x:.1%}" for x in shares),
        *("" if x is None else f"{x:.1f}" for x in (f.peak, f.planned)),
        "" if off is None else f"{off:+.1%}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/gpu_day"), help="for all files")
    parser.add_argument("--cases", nargs="*", default=[], help="parts of names (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU")
    return parser


if __name__ == "__main__":
    main()
