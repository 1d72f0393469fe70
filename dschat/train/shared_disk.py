"""Whether every rank sees the output folder, asked before a run trains."""

from __future__ import annotations

import functools
import socket
import time
import uuid
from pathlib import Path

from dschat.errors import UserError
from dschat.utils.distributed import from_main, on_every_rank

_SEEN = ".seen-by-all-"  # and a number: a file that every rank looks for


def check_shared(output_dir: str, patience: float = 15.0) -> None:
    """Stop where a rank does not see what rank 0 writes: its part of a checkpoint would be lost.

    Args:
        patience: seconds that a network file system may take to show a new file.

    Raises:
        UserError: on every rank, naming the first such machine.
    """
    folder = Path(output_dir)

    def write() -> str:
        for left in folder.glob(f"{_SEEN}*"):
            left.unlink()
        name = f"{_SEEN}{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    name = from_main(write)
    try:
        on_every_rank(functools.partial(_look_for, folder / name, patience))
    finally:
        from_main(functools.partial((folder / name).unlink, missing_ok=True))


def _look_for(file: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while not file.exists():
        if time.monotonic() > end:
            raise UserError(
                f"output_dir {file.parent}: {socket.gethostname()} does not see what rank 0 writes "
                "there, as checkpoints need; give a folder on a disk that all machines share, or "
                "drop save_steps and resume"
            )
        time.sleep(0.1)
