"""One rank that runs shipped programs in turn, each in a process of its own that may be killed.

Started with one argument: a JSON file that holds a list of runs (`resume_runs.Run`, and a port).
Each is a fork of this process, which has imported everything already, in the folder of that file.
On rank 0, `shell` is run before it, and the first `torch.save` or `os.rename` to a path like the
one of `kill` is the last thing that happens; then SIGKILL ends all ranks. `signal` is sent to one
rank, when the metrics have so many lines. What came of the runs goes into `results.<rank>.json`
beside the list.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from dschat import config as arguments
from dschat.utils.launchers import rank_of
from tests.helpers.steps_worker import count_reads, run, spare_the_disk

TARGETS = {"torch.save": (torch, "save"), "os.rename": (os, "rename")}


# Imported or looked up here once, not in every run.
HEAVY = (arguments, transformers.get_scheduler, transformers.LlamaForSequenceClassification)


def kill_all(pids: Path) -> None:
    """End every rank of the run as a power failure would, this one last."""
    for file in pids.iterdir():
        if (pid := int(file.read_text())) != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(call: str, pattern: str, pids: Path) -> None:
    """Have such a call be the last thing that the run does."""
    owner, name = TARGETS[call]
    original: Callable = getattr(owner, name)

    def fatal(source, target, *args, **kwargs):
        result = original(source, target, *args, **kwargs)
        if fnmatch.fnmatch(str(target), pattern):
            kill_all(pids)
        return result

    setattr(owner, name, fatal)


def child(item: dict, folder: Path, rank: int) -> None:
    """Be one run; never returns."""
    out = os.open(folder / f"out.{rank}", os.O_WRONLY | os.O_CREAT)
    err = os.open(folder / f"err.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ["MASTER_PORT"] = item["port"]
    (folder / "pids" / str(rank)).write_text(str(os.getpid()))
    if item["kill"] and rank == 0:
        arm(*item["kill"], folder / "pids")
    read = count_reads()
    code = run([os.path.expandvars(word) for word in item["argv"]])
    (folder / f"read.{rank}").write_text("\n".join(read))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def send_signal(item: dict, pid: int) -> None:
    """Send the run's signal to this rank, when its metrics have the lines for it."""
    name, _, lines = item["signal"]
    metrics = Path(item["argv"][item["argv"].index("--output_dir") + 1], "metrics.jsonl")
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return  # it has ended, which the result tells
        time.sleep(0.01)
    os.kill(pid, signal.Signals[name])


def main() -> None:
    """Run them all, whatever comes of each."""
    plan, rank = Path(sys.argv[1]), rank_of(os.environ)
    spare_the_disk()
    os.chdir(plan.parent)
    results = []
    for number, item in enumerate(json.loads(plan.read_text())):
        folder = plan.with_name(f"run-{number}")
        (folder / "pids").mkdir(parents=True, exist_ok=True)
        if item["shell"] and rank == 0:
            subprocess.run(item["shell"], shell=True, check=True)
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            child(item, folder, rank)
        if item["signal"] and item["signal"][1] == rank:
            send_signal(item, pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"-- run {number} ended with {code} after {time.perf_counter() - start:.1f} s")
        read = folder / f"read.{rank}"
        results.append(
            {
                "code": code,
                "stdout": (folder / f"out.{rank}").read_text(),
                "stderr": (folder / f"err.{rank}").read_text(),
                "read": read.read_text().splitlines() if read.exists() else [],
            }
        )
    plan.with_name(f"results.{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
