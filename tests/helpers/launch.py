"""Start a script on several ranks of this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]


# Seconds after which a process that a test started counts as hung. No test comes near it: on a
# loaded machine of a tenth of the speed the longest launch takes about two thirds of it.
TIME_LIMIT = 1800.0


def run_ranks(
    script: str | Path,
    ranks: int | None,
    args: Sequence[str],
    log_dir: Path,
    cwd: Path | None = None,
) -> list[str]:
    """Run `script` on `ranks` processes over gloo on the CPU.

    Args:
        ranks: None: one process, without the variables of a launcher.
        log_dir: an existing folder for one log a rank.

    Returns:
        What each rank printed.

    Raises:
        RuntimeError: a rank failed, or they still run after TIME_LIMIT; all are killed, and the
            message ends with the failing rank's log.
    """
    shared = {
        **{name: value for name, value in os.environ.items() if name not in warm.OWN},
        **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        **{"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    }
    own = [{}] if ranks is None else variables_of(ranks)
    name = f"{Path(script).stem}-{len(own)}"
    logs = [log_dir / f"{name}.{rank}.log" for rank in range(len(own))]
    processes: list[warm.Process] = []
    try:
        for rank, (log, variables) in enumerate(zip(logs, own, strict=True)):
            with log.open("w") as out:
                command, env = [str(script), *args], shared | variables
                processes.append(warm.start(command, cwd or Path.cwd(), env, out, out, rank))
        _wait(processes, logs, time.monotonic() + TIME_LIMIT)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [log.read_text() for log in logs]


def variables_of(ranks: int) -> list[dict[str, str]]:
    """The variables by which a launcher tells each rank its place."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["LOCAL_WORLD_SIZE"] = str(ranks)
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: Sequence[warm.Process], logs: list[Path], deadline: float) -> None:
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
