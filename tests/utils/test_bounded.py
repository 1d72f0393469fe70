"""What a limit leaves behind when it is passed."""

import resource
import signal
import time

import pytest

from dschat.utils.bounded import TooMuchError, bounded


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_puts_things_back_is_not_stopped_as_well():
    """The limit is passed at each look from then on; a second stop would leave the timer on."""
    handler, room, put_back = (
        signal.getsignal(signal.SIGVTALRM),
        resource.getrlimit(resource.RLIMIT_AS),
        False,
    )
    with pytest.raises(TooMuchError, match=r"more than 0.2 s"), bounded(0.2, 1e9, "no end"):
        try:
            busy(60)
        finally:
            busy(0.2)  # several looks
            put_back = True
    assert put_back and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert resource.getrlimit(resource.RLIMIT_AS) == room
