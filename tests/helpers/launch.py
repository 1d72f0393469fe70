"""Start a script on several ranks of this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# Seconds after which a process that a test started counts as hung. No test comes near it: on a
# loaded machine of a tenth of the speed the longest launch takes about two thirds of it.
TIME_LIMIT = 1800.0


def run_ranks(script: str | Path, ranks: int, args: Sequence[str], log_dir: Path) -> list[str]:
    """Run `script` on `ranks` processes over gloo on the CPU.

    Args:
        log_dir: an existing folder for one log a rank.

    Returns:
        What each rank printed.

    Raises:
        RuntimeError: a rank failed, or they still run after TIME_LIMIT; all are killed, and the
            message ends with the failing rank's log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    name = f"{Path(script).stem}-{ranks}"
    logs = [log_dir / f"{name}.{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *args],
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(processes, logs, time.monotonic() + TIME_LIMIT)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [log.read_text() for log in logs]


def _wait(processes: list[subprocess.Popen], logs: list[Path], deadline: float) -> None:
    """Wait until all ranks end well; the first that fails ends it, as the others would hang."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            tails = "\n".join(log.read_text()[-2000:] for log in logs)
            raise RuntimeError(f"ranks still run after the time limit\n{tails}")
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        if process.poll():
            text = log.read_text()[-4000:]
            raise RuntimeError(f"rank {rank} ended with {process.returncode}\n{text}")
