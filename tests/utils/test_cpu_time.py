"""What counts as work of a process, measured by CPU time alone."""

import os
import sys
import threading
import time

import pytest

from dschat.utils.cpu_time import cpu_time

SPUN = 50_000_000  # ns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")


def spin() -> None:
    while time.thread_time_ns() < SPUN:
        pass


@pytest.mark.parametrize("daemon", [False, True])
def test_threads_that_are_waited_for_are_work_and_daemons_are_not(daemon):
    before, done = cpu_time(), threading.Event()
    during: list[int] = []

    def work() -> None:
        spin()
        during.append(cpu_time())
        done.set()

    thread = threading.Thread(target=work, daemon=daemon)
    thread.start()
    done.wait()
    assert (during[0] - before > SPUN / 2) != daemon
    thread.join()


def test_processes_below_are_work():
    (told, tell), (go, leave) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(leave)
        end = time.thread_time_ns() + SPUN
        while time.thread_time_ns() < end:
            pass
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    os.read(told, 1)
    with_child = cpu_time()
    os.write(leave, b"x")
    os.waitpid(child, 0)
    assert with_child - cpu_time() > SPUN / 2
