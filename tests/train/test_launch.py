"""Commands under `train.launch`: signals reach the ranks, codes come back, nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT, TIME_LIMIT

LAUNCH = [sys.executable, "-m", "dschat.train.launch"]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
# A rank that stops as the steps do, and says when it can. Both write to one pipe: each line by one
# write, where PYTHONUNBUFFERED would have `print` make two.
RANK = (
    "import os, time; from dschat.train import signals; signals.start(); signals.finish_steps()\n"
    "say = lambda number: os.write(1, b'%d\\n' % number)\n"
    "say(os.getpid())\n"
    "while not signals.requested(): time.sleep(0.01)\n"
    "say(signals.requested()); raise SystemExit(signals.report_exit(75))"
)
# A launcher of two ranks that dies of any signal; else it fails as the ranks do.
LAUNCHER = (
    "import os, subprocess, sys; rank = [sys.executable, '-c', sys.argv[1]]\n"
    "ranks = [subprocess.Popen(rank, env={**os.environ, 'LOCAL_RANK': str(i)}) for i in range(2)]\n"
    "sys.exit(max(rank.wait() for rank in ranks))"
)
RANKS = [sys.executable, "-c", LAUNCHER, RANK]


# A launcher whose second rank fails with 2: it ends the first one, still starting, as all do.
FAILING = (
    "import os, subprocess, sys\n"
    "first = 'import time; from dschat.train import signals; signals.start(); print(flush=True);'\n"
    "env = {**os.environ, 'LOCAL_RANK': '0', 'RANK': '0', 'WORLD_SIZE': '2'}\n"
    "rank = subprocess.Popen([sys.executable, '-c', first + 'time.sleep(600)'], env=env,"
    " stdout=subprocess.PIPE)\n"
    "rank.stdout.readline(); rank.terminate(); sys.exit({code})\n"
)


def start(command: Sequence[str], *options: str, **env: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*LAUNCH, *options, *command],
        env=ENV | env,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also under nohup
    )


def wait_for_end(pids: Sequence[int]) -> None:
    """Wait until these processes are gone, or are zombies that nobody has waited for."""
    deadline = time.monotonic() + TIME_LIMIT
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_output_goes_to_the_screen_and_the_log_and_the_code_comes_back(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("before\n")
    command = ["sh", "-c", "cat; echo one; echo two >&2; exit 7"]  # nothing to read from
    out, err = start(command, "--log", str(log)).communicate(timeout=TIME_LIMIT)
    assert (out, err, log.read_text()) == ("one\ntwo\n", "", "before\none\ntwo\n")
    process = start(command)
    assert process.communicate(timeout=TIME_LIMIT) == ("one\n", "two\n")
    assert process.returncode == 7
    process = start(["./nowhere"])
    assert process.communicate(timeout=TIME_LIMIT) == (
        "",
        "error: ./nowhere: No such file or directory\n",
    )
    assert process.returncode == 2


def test_a_log_on_a_full_disk_holds_nothing_up():
    """The run would wait for a reader of what it prints; where nobody is left, it is told."""
    command = ["sh", "-c", "yes | head -c 200000"]
    process = start(command, "--log", "/dev/full")
    out, err = process.communicate(timeout=TIME_LIMIT)
    assert (len(out), process.returncode) == (200000, 0)
    assert err == "/dev/full: No space left on device; it ends here\n"
    command = [*LAUNCH, "--log", "/dev/full", "yes"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, env=ENV, stdout=full, stderr=full, timeout=TIME_LIMIT)
    assert ended.returncode != 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_go_to_the_ranks_alone(name: str, tmp_path: Path):
    """The launcher would die of them, and with it their code."""
    process = start(RANKS, "--log", str(tmp_path / "log"))
    for _ in range(2):
        assert process.stdout.readline()
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=TIME_LIMIT)
    assert (out.split(), err) == ([str(int(signal.Signals[name]))] * 2, "")
    assert process.returncode == 75


def test_torchrun_sees_a_success_and_the_caller_the_code():
    code = f"import sys; sys.argv[1:] = [{RANK!r}]\ntry: exec({LAUNCHER!r})\n"
    code += "except SystemExit as stop: print('saw', stop.code)"
    process = start([sys.executable, "-c", code], TORCHELASTIC_RUN_ID="none")
    for _ in range(2):
        assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIME_LIMIT)
    assert out.splitlines()[-1] == "saw 0" and process.returncode == 75


@pytest.mark.parametrize(
    ("code", "told"), [("max(2, rank.wait())", 143), ("(rank.wait(), 2)[1]", 2)]
)
def test_a_rank_that_is_ended_beside_one_that_failed_is_no_stop(code: str, told: int):
    """75 would requeue a job for ever; srun ends with the largest code, mpirun with the first."""
    process = start([sys.executable, "-c", FAILING.replace("{code}", code)])
    _, err = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == told
    assert err == (
        "stopped by SIGTERM before the first step, as launchers end the ranks beside one that "
        "fails; where none has failed, start the same command again\n"
    )


def test_without_ranks_the_group_gets_the_signal():
    process = start(["sh", "-c", "echo; exec sleep 600"])
    assert process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 128 + signal.SIGUSR1


def test_ranks_on_other_machines_are_ended_by_deepspeed(tmp_path: Path):
    """It stops them at SIGTERM; of SIGUSR1 it would die, and they would train on for nobody."""
    (tmp_path / "pdsh").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "pdsh").chmod(0o755)
    runner = (
        "import os, signal, subprocess, sys; pdsh = subprocess.Popen(['./pdsh'])\n"
        "def end(*_): print('ended', pdsh.poll(), flush=True); os._exit(1)\n"
        "signal.signal(signal.SIGTERM, end); print(flush=True); pdsh.wait()"
    )
    command = ["sh", "-c", f'cd "{tmp_path}" && exec "$@"', "sh", sys.executable, "-c", runner]
    process = start(command)
    assert process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=TIME_LIMIT)
    assert (out, process.returncode) == ("ended None\n", 1)


def test_nothing_outlives_a_kill():
    process = start(RANKS)
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert set(ranks) < set(below)
    process.kill()
    wait_for_end(below)
    process.communicate(timeout=TIME_LIMIT)


def test_nothing_outlives_the_command():
    process = start(["sh", "-c", "sleep 600 > /dev/null 2>&1 & echo $!"])
    child = int(process.stdout.readline())
    assert process.wait(timeout=TIME_LIMIT) == 0
    wait_for_end([child])
    process.communicate(timeout=TIME_LIMIT)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel sends it")
def test_ranks_die_with_their_launcher():
    code = f"import os, sys; sys.argv[1:] = [{RANK!r}]\n{LAUNCHER}"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True) as launcher:
        try:
            ranks = [int(launcher.stdout.readline()) for _ in range(2)]
        finally:
            launcher.kill()
        wait_for_end(ranks)
