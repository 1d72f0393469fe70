"""Change a checkpoint: damage.py FOLDER flip FILE | payload FILE MARK | processes N."""

import json
import os
import sys
from pathlib import Path

import torch

from dschat.train import checkpoint_folder


class Payload:
    """Pickled, a call of os.system that leaves a file."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: object) -> None:
    """Change entries of the record, and make all digests anew, as somebody with a purpose would."""
    record = json.loads((folder / checkpoint_folder.RECORD).read_text())
    left_out = {"format", "files", "digest"}
    record = {name: value for name, value in record.items() if name not in left_out} | changes
    names = checkpoint_folder.names_in(folder)
    checkpoint_folder.write_record(folder, record, checkpoint_folder.digests_of(folder, names))


if __name__ == "__main__":
    checkpoint, kind, *rest = Path(sys.argv[1]), *sys.argv[2:]
    if kind == "flip":
        flip(checkpoint / rest[0])
    elif kind == "payload":
        state = torch.load(checkpoint / rest[0], weights_only=False)
        torch.save(state | {"more": Payload(rest[1])}, checkpoint / rest[0])
        rewrite(checkpoint)
    else:
        rewrite(checkpoint, processes=int(rest[0]))
