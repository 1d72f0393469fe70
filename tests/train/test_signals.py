"""Signals in a loop, before it, twice, in forked workers and in a library; no torch is imported."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dschat.train import signals
from tests.helpers.launch import ROOT, TIME_LIMIT

START = "import os, sys, time; from dschat.train import signals; signals.start(); "
# Without the interpreter: no handler of its main thread can run before the end of this.
IN_A_LIBRARY = "import hashlib; print(flush=True); hashlib.pbkdf2_hmac('sha1', b'', b'', 10**9)"
LOOP = (
    "signals.finish_steps(); print(flush=True)\nwhile not signals.requested(): time.sleep(0.01)\n"
)
STOP = "raise signals.Stopped(signals.requested(), 7, 'out/step')"
UNTIL_KILLED = "print(flush=True)\nwhile True: time.sleep(0.01)"


def run(code: str, *sent: signal.Signals, rank: str = "0") -> tuple[int, str]:
    """Exit code and standard error of a program that gets a signal after each line it prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": rank}
    command, pipe = [sys.executable, "-c", START + code], subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        for number in sent:
            assert process.stdout.readline()
            process.send_signal(number)
        _, err = process.communicate(timeout=TIME_LIMIT)
    return process.returncode, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_before_the_loop_a_signal_ends_at_once(name):
    line = f"stopped by {name} before the first step; start the same command again\n"
    assert run(IN_A_LIBRARY, signal.Signals[name]) == (75, line)


def test_a_signal_ends_it_also_where_nothing_takes_the_line():
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2); "
    assert run(full + IN_A_LIBRARY, signal.SIGTERM) == (75, "")


def test_other_ranks_are_silent():
    assert run(IN_A_LIBRARY, signal.SIGTERM, rank="1") == (75, "")


def test_in_the_loop_the_step_is_finished():
    assert run(LOOP + "print(signals.requested(), file=sys.stderr); " + STOP, signal.SIGUSR1) == (
        75,
        f"{signal.SIGUSR1:d}\n",  # no traceback
    )


def test_a_second_signal_ends_at_once_unless_it_is_an_echo():
    code = f"{LOOP}signals._watch.first_at -= signals.ECHO\n{IN_A_LIBRARY}"
    line = "ended by a second signal, SIGINT: what was done since the last checkpoint is lost\n"
    assert run(code, signal.SIGTERM, signal.SIGINT) == (130, line)
    code = f"{LOOP}print(flush=True); time.sleep(0.1); print('here', file=sys.stderr); {STOP}"
    assert run(code, signal.SIGINT, signal.SIGTERM) == (75, "here\n")


def test_signals_of_a_forked_worker_are_its_own():
    code = (
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(60); os._exit(1)\n"
        "os.kill(pid, 15); print(os.waitpid(pid, 0)[1], signals.requested(), file=sys.stderr)"
    )
    assert run("signals.finish_steps()\n" + code) == (0, "15 0\n")


def test_ending_ranks_keep_their_code():
    code = f"signals.restore(); signals.ignore_at_exit(); import atexit\n{UNTIL_KILLED}"
    assert run(code, signal.SIGTERM) == (-15, "")
    # Registered first, so run after the one that ignores.
    waits = "import atexit; atexit.register(lambda: (print(flush=True), time.sleep(0.1)))\n"
    code = f"{waits}signals.restore(); signals.ignore_at_exit(); sys.exit(75)"
    assert run(code, signal.SIGTERM) == (75, "")


def test_handlers_are_put_back():
    before = {name: signal.getsignal(name) for name in signals.STOP_SIGNALS}
    before.pop(signal.SIGHUP)  # stays ignored under nohup
    threads = threading.active_count()
    signals.start()
    assert all(signal.getsignal(name) is signals._nothing for name in before)
    signals.restore()
    assert {name: signal.getsignal(name) for name in before} == before
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads


def test_another_thread_installs_nothing():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=signals.start)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_launcher_that_ends_with_a_code_of_its_own_is_named(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv(signals.CODE_FILE, raising=False)
    end = "; torchrun adds a report and ends with 1, under `python -m dschat.train.launch` with 75"
    assert signals.Stopped(signal.SIGTERM, 7, "out/step").line.endswith(end)
    monkeypatch.setenv(signals.CODE_FILE, "code")
    assert "torchrun" not in signals.Stopped(signal.SIGTERM, 7, "out/step").line


def test_a_launcher_on_another_machine_is_not_told(monkeypatch, tmp_path):
    """srun gives its tasks the variables of `train.launch`, whose folder is on one machine."""
    monkeypatch.setenv(signals.CODE_FILE, str(tmp_path / "gone" / "code"))
    assert signals.report_exit(75) == 75
    monkeypatch.setenv(signals.CODE_FILE, str(tmp_path / "code"))
    assert signals.report_exit(75) == 75 and (tmp_path / "code").read_text() == "75"


def test_how_to_go_on():
    stop = signals.Stopped(signal.SIGUSR1, 7, None)
    assert stop.code == 75
    assert stop.line == (
        "stopped by SIGUSR1 after step 7: streamed rows cannot be resumed, start from the beginning"
    )


RECIPES = sorted((ROOT / "training").glob("step*/main.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_takes_signals_before_its_imports(recipe):
    first = recipe.read_text(encoding="utf-8").split("\nfrom __future__ import annotations\n")[1]
    assert first.lstrip().startswith('if __name__ == "__main__":')
    assert first.index("signals.start()") < first.index("from dschat.config")
