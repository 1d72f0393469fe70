"""A watch over the other ranks: none is waited for longer than `rank_timeout`, nor without a word.

Each rank tells the others by the store of the process group, every few seconds, how many places it
has come to; all ranks come to the same ones in the same order (`places`). A thread of each rank
ends the process when

- the main thread has waited in a collective for that long, and a rank has not come to it
- a rank has given no sign of life for that long: it was killed, or stopped
- the main thread does work that the others wait for, and nothing of it has run for that long: its
  disk hangs, say
- another rank has announced (`tell`) that it ends for a reason of its own; one rank reports it

Rank-dependent work of any length (a tokenisation, a large model being written) is no such wait:
others wait for it in a `patient` place. The process group's own limit is further away.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from dschat.lazy import dist
from dschat.utils import places
from dschat.utils.cpu_time import cpu_time
from dschat.utils.places import here
from dschat.utils.printable import last_line

LOST = 1  # exit code
_DONE = json.dumps(["done"])  # in place of a sign of life
_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL")


class LostRankError(RuntimeError):
    """Another rank has ended or does not answer; the message says which, and where."""


class RankWatch:
    """The watch of one rank of several."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: float, key: str):
        self.rank, self.ranks, self.timeout, self.key = rank, ranks, timeout, key
        self.interval = min(timeout / 10, 5.0)
        self._store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: the main thread may wait in another
        self._store.set_timeout(timedelta(days=1))
        self._leaves = threading.Lock()
        self._ended, self._last = threading.Event(), f"{key}/last word"
        self._has_told = False
        self._beats: dict[int, str] = {}
        now = time.monotonic()
        self._heard = dict.fromkeys(range(ranks), now)
        self._exchanged = self._ran_at = now
        self._ran = 0
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the watch, and tell the others that this rank is not missed any more."""
        self._ended.set()
        self._be_done()

    def _be_done(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self.key}/{self.rank}", _DONE)

    def tell(self, line: str, code: int) -> None:
        """Tell the others to end with this code, as this rank does now; see the function `tell`."""
        self._has_told = True
        self._ended.set()
        word = json.dumps([-1 if self.rank == 0 else 0, line, code])
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._last, "", word)
        self._be_done()
        if self.rank == 0:
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Keep the store, which is rank 0's, until the others have read the last word."""
        keys = [f"{self.key}/{rank}" for rank in range(1, self.ranks)]
        deadline = time.monotonic() + 4 * self.interval
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                present = [key for key in keys if self._store.check([key])]
                if all(value.decode() == _DONE for value in self._store.multi_get(present)):
                    return
                time.sleep(0.05)

    def silent(self, seconds: float) -> list[int]:
        """Ranks without a sign of life for so long."""
        now = time.monotonic()
        if now - self._exchanged > seconds and self.rank != 0:
            return [0]  # which keeps the store
        return [
            rank
            for rank, heard in self._heard.items()
            if now - heard > seconds and self._beats.get(rank) != _DONE
        ]

    def _exchange(self) -> None:
        """Give and take signs of life; a store that does not answer holds up this thread alone."""
        keys = [f"{self.key}/{rank}" for rank in range(self.ranks)]
        beats = 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                beats += 1
                mine = json.dumps([beats, here.count, str(here)])
                self._store.set(keys[self.rank], mine)
                present = [key for key in keys if self._store.check([key])]
                values = self._store.multi_get(present)
                now = time.monotonic()
                for key, value in zip(present, values, strict=True):
                    rank, beat = int(key.rpartition("/")[2]), value.decode()
                    if self._beats.get(rank) != beat:
                        self._beats[rank], self._heard[rank] = beat, now
                self._exchanged = self._heard[self.rank] = now
                self.heed()
                self._ended.wait(self.interval)

    def heed(self) -> None:
        """End this process where another rank has said the last word."""
        if not self._has_told and self._store.check([self._last]):
            self._leave(self._store.get(self._last))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.interval / 2):
            now = time.monotonic()
            if now - last > 3 * self.interval:  # this rank was stopped itself, perhaps all were
                self._heard = dict.fromkeys(self._heard, now)
                self._exchanged = here.since = now
            last = now
            if here.works and self._is_stuck(now):
                line = f"rank {self.rank} was stuck for {self.timeout:g} s in {here}; the run ends"
                word = json.dumps([self.rank, f"error: {line}"])
                self._leave(self._store.compare_set(self._last, "", word))
            missing, why = self.silent(self.timeout), "no sign of life"
            if not missing and here.waits and now - here.since > self.timeout:
                missing = self._behind()
                if missing and missing[0] not in self.silent(3 * self.interval):
                    why = f"still in {json.loads(self._beats[missing[0]])[2]}"
            if missing:
                self._end(missing, why)

    def _is_stuck(self, now: float) -> bool:
        """Tell whether the work of this rank has not run for the time limit."""
        ran = cpu_time()
        if ran != self._ran:
            self._ran, self._ran_at = ran, now
        return now - max(self._ran_at, here.since) > self.timeout

    def _end(self, missing: Sequence[int], why: str) -> None:
        """End the run: the first rank that is not missing says why."""
        line = f"{self.timeout:g} s for {_ranks(missing)} in {here} ({why}); the run ends"
        first = min(set(range(self.ranks)) - set(missing))
        word = json.dumps([first, f"error: rank {first} waited {line}"])
        # The store is rank 0's: without that there is nobody to ask whether it is said already.
        is_lost = 0 in missing and 0 in self.silent(3 * self.interval)
        self._leave(word if is_lost else self._store.compare_set(self._last, "", word))

    def _leave(self, word: bytes | str) -> None:
        self.leave_once()
        first, line, *code = json.loads(word)
        if self.rank == first:
            last_line(line)
        if code:  # from the store, which therefore answers
            self._be_done()
        if self.rank == 0:
            self._wait_for_others()
        os._exit(code[0] if code else LOST)

    def leave_once(self) -> None:
        """Let one thread alone end the process, and say why; the others wait here for that."""
        self._leaves.acquire()

    def _behind(self) -> list[int]:
        """Ranks that have not come to this place, by what they last said."""
        counts = {rank: json.loads(beat)[1:2] for rank, beat in self._beats.items()}
        return [rank for rank, count in counts.items() if count and count[0] < here.count]


def _ranks(numbers: Sequence[int]) -> str:
    names = ", ".join(map(str, numbers))
    return f"rank {names}" if len(numbers) == 1 else f"ranks {names}"


_watch: RankWatch | None = None
_starts = 0
atexit.register(lambda: stop())


def start(store: dist.Store, rank: int, ranks: int, timeout: float) -> None:
    """Watch over the other ranks; every rank calls it."""
    global _watch, _starts
    stop()
    _starts += 1
    here.count, here.waits = 0, False
    places.in_step(0)
    _watch = RankWatch(store, rank, ranks, timeout, f"dschat/watch/{_starts}")


def stop() -> None:
    """End the watch, where there is one."""
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def tell(line: str, code: int) -> None:
    """End all ranks with this code: one of them ends for a reason that the others do not know.

    Rank 0 comes back when they have heard it. Where all know it, they need not.

    Args:
        line: said by rank 0, unless it is rank 0 that calls, which has said it.
    """
    if _watch is not None:
        _watch.tell(line, code)


def heed() -> None:
    """End this process if another rank has announced its end (`tell`)."""
    if _watch is not None:
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
            _watch.heed()


def is_on() -> bool:
    """Tell whether this is one of several ranks that watch over each other."""
    return _watch is not None


def explain(error: Exception) -> str | None:
    """Say which rank an error of a collective is about; None for any other error.

    Empty on ranks that leave it to another one to say it.
    """
    if _watch is None or not any(sign in str(error) for sign in _SIGNS):
        return None
    heed()
    ranks = set(range(_watch.ranks))
    missing = sorted(ranks - {_watch.rank}) if len(ranks) == 2 else []
    deadline = time.monotonic() + 4 * _watch.interval
    while not missing and time.monotonic() < deadline:
        time.sleep(_watch.interval / 4)
        missing = _watch.silent(2.5 * _watch.interval)
    _watch.leave_once()
    if missing and _watch.rank != min(ranks - set(missing)):
        return ""
    return f"rank {_watch.rank} lost {_ranks(missing) if missing else 'another rank'} in {here}"
