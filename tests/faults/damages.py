"""Damage to one file: what disks, copies and people do to it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

KIB = 1024


def damages_of(content: bytes, sibling: bytes | None = None) -> Iterator[tuple[str, bytes | None]]:
    """Yield every damage of a file by its name, and the bytes that it leaves; None: no file.

    One bit is flipped in the first, the middle and the last byte, and in one of each KiB that the
    content draws; the file is cut by half and by a byte, emptied, grown, removed, and replaced by
    its sibling of another folder.
    """
    last = len(content) - 1
    places = {"first": 0, "middle": len(content) // 2, "last": last} if content else {}
    draw = random.Random(len(content))
    for start in range(0, len(content), KIB):
        places[f"kib {start // KIB}"] = draw.randint(start, min(start + KIB, len(content)) - 1)
    for name, place in places.items():
        yield name, flipped(content, place, draw.randrange(8))
    if content:
        yield "half", content[: len(content) // 2]
        yield "short", content[:-1]
        yield "empty", b""
    yield "longer", content + b"\0"
    yield "removed", None
    if sibling is not None and sibling != content:
        yield "sibling", sibling


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """Flip one bit of the byte at a place."""
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def put(path: Path, content: bytes | None) -> None:
    """Have a file hold these bytes; None removes it."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def break_file(path: Path, how: str) -> None:
    """Break a file as a case says: `first`, `middle`, `end`: a bit; or a name of `damages_of`."""
    content = path.read_bytes()
    # Of the first bytes, one behind a magic number's first.
    places = {"first": min(2, len(content) - 1), "middle": len(content) // 2, "end": -1}
    cuts = {"truncate": content[: len(content) // 2], "short": content[:-1], "empty": b""}
    if how in places:
        put(path, flipped(content, places[how]))
    else:
        put(path, None if how == "remove" else cuts[how])
