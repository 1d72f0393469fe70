"""The machines of a run, from the file that `deepspeed --hostfile` reads."""

from __future__ import annotations

import re
from pathlib import Path

from dschat.errors import UserError, brief

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\b")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Map each machine to its processes, in the file's order; `#` begins a comment.

    Raises:
        UserError: no such file, or one that `deepspeed` would not start from; with the line.
    """
    if not Path(path).is_file():
        raise UserError(f"hostfile {path}: no such file; name one, with {_REMEDY}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else brief(error)
        raise UserError(f"hostfile {path}: {reason}; give {_REMEDY}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.match(line)
        if found is None or int(found[2]) == 0:
            raise UserError(f"hostfile {path} line {number}: {line!r}; give {_REMEDY}")
        if found[1] in hosts:
            raise UserError(f"hostfile {path} line {number}: {found[1]} stands twice; drop one")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"hostfile {path}: it names no machine; give {_REMEDY}")
    return hosts


_REMEDY = "a line `host slots=8` for each machine, with its number of GPUs"
