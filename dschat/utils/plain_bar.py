"""A progress bar where there is no terminal: a line now and then, without carriage returns."""

from __future__ import annotations

import time
from typing import IO

EVERY = 10.0  # seconds between lines of a file
EVERY_SEEN = 4.0  # and of one that a terminal shows meanwhile


class PlainBar:
    """The stream that a bar of tqdm draws on; what it draws becomes lines of another one.

    The last state is always written, at the line's end that tqdm closes a bar with.

    Args:
        every: seconds between lines.
    """

    def __init__(self, stream: IO[str], every: float = EVERY):
        self._stream, self._every, self._drawn, self._next = stream, every, "", 0.0

    @property
    def encoding(self) -> str:
        """The other stream's: it decides by which characters a bar is drawn."""
        return str(getattr(self._stream, "encoding", None) or "ascii")

    def write(self, text: str) -> int:
        """Take what tqdm draws: a state, blanks over the one before, or the bar's end."""
        drawn = text.strip()
        if drawn:
            self._drawn = drawn
        if "\n" in text or (drawn and time.monotonic() >= self._next):
            self._tell()
        return len(text)

    def flush(self) -> None:
        """Flush the other stream."""
        self._stream.flush()

    def _tell(self) -> None:
        if self._drawn:
            self._stream.write(self._drawn + "\n")
            self._drawn, self._next = "", time.monotonic() + self._every
