"""No figure, wait or decision hangs on a clock that jumps: seconds are those of a monotonic one."""

import re

from tests.test_doors import ROOT, SOURCES

JUMPS = re.compile(
    r"\btime\.(time|time_ns|localtime|gmtime|ctime|strftime)\(|\bfrom time import|"
    r"\bdatetime\.\w*(now|today)\(|\bdate\.today\("
)


def test_nothing_asks_the_clock_on_the_wall():
    """A checkpoint of a version that had no note of its end is known by the times of its files."""
    found = {
        path.relative_to(ROOT).as_posix() for path in SOURCES if JUMPS.search(path.read_text())
    }
    assert found == set()


def test_the_rule_sees():
    for text in ("time.time()", "time.time_ns()", "datetime.now(UTC)", "from time import time"):
        assert JUMPS.search(text)
    for text in ("time.monotonic()", "time.perf_counter()", "time.thread_time()", "datetime.UTC"):
        assert not JUMPS.search(text)
