"""What a person sees of a command: its widest line, its longest silence, lines that are not ours.

    python -m benchmarks.terminal --out recording.txt -- dschat run quickstart --output_dir out

The command runs in a terminal of 80 columns. The recording has a line for each line of the screen,
with the second it came at. The processor time says how much of a silence was the machine's.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS, ROWS = 80, 24
_STYLE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][AB012])")
# How libraries' own lines begin or look: loggers, Python's warnings, launchers.
_FOREIGN = re.compile(
    r"^\[?\d{4}-\d\d-\d\d[ T]\d\d:|^\[(transformers|rank\d|W\d+|I\d+)"
    r"|^(WARNING|INFO|DEBUG|Failed)\b"
    r"|\.py:\d+: \w*Warning|Warning:|^\s+warnings\.warn|Traceback"
)


@dataclass
class Recording:
    """Lines with the second of their last change, and the silences between two signs of life."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    silences: list[tuple[float, float, str]] = field(default_factory=list)  # length, at, after what
    code: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def record(command: Sequence[str]) -> Recording:
    """Run a command in a terminal, to its end."""
    start, made = time.monotonic(), Recording()
    pid, master = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        del os.environ["COLUMNS"], os.environ["LINES"]
        os.execvp(command[0], list(command))
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    pending, heard = "", start
    while True:
        select.select([master], [], [], 0.5)
        try:
            data = os.read(master, 1 << 16) if select.select([master], [], [], 0)[0] else None
        except OSError:  # the other end is closed
            break
        if data == b"":
            break
        if data is None:
            continue
        now = time.monotonic()
        last = made.lines[-1][1] if made.lines else "the start"
        made.silences.append((now - heard, heard - start, pending or last))
        heard = now
        *whole, pending = re.split(r"[\r\n]+", pending + data.decode("utf-8", "replace"))
        made.lines += [(now - start, _STYLE.sub("", line).rstrip()) for line in whole if line]
    if pending:
        made.lines.append((time.monotonic() - start, _STYLE.sub("", pending)))
    _, status, usage = os.wait4(pid, 0)
    made.code, made.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - start
    made.cpu_seconds = usage.ru_utime + usage.ru_stime
    return made


def summary(made: Recording) -> dict[str, object]:
    """Sum a recording up."""
    texts = [text for _, text in made.lines]
    longest = sorted(made.silences, reverse=True)[:5]
    return {
        "code": made.code,
        "seconds": round(made.seconds, 1),
        "cpu_seconds": round(made.cpu_seconds, 1),
        "widest": max(map(len, texts), default=0),
        "wrapped": sorted({text for text in texts if len(text) > COLUMNS}),
        "foreign": sorted({text for text in texts if _FOREIGN.search(text)}),
        "without a figure": sum(bool(re.search(r"\bn/a\b", text)) for text in texts),
        "silences": [f"{s:.1f} s from {at:.1f} s, after: {what[-60:]}" for s, at, what in longest],
    }


def main() -> None:
    """Record a command; print the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file of the recording")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    made = record(args.command)
    if args.out is not None:
        lines = [f"{at:8.1f} {text}\n" for at, text in made.lines]
        args.out.write_text("".join(lines), encoding="utf-8")
    print(json.dumps(summary(made), indent=1, ensure_ascii=False))
    sys.exit(made.code)


if __name__ == "__main__":
    main()
