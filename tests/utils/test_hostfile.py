"""Hostfiles: what DeepSpeed's launcher reads is read alike, what it would refuse is one line."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from dschat.errors import UserError
from dschat.utils.hostfile import read_hostfile


@pytest.mark.parametrize(
    "text",
    [
        "node-1 slots=8\nnode-2 slots=4\n",
        "# ours\n\n  node-1\tslots=8   # the first\r\n10.0.0.2 slots=1",
        "user@node-1 slots=2 max_slots=4\n",
    ],
)
def test_machines_are_those_of_deepspeed(tmp_path: Path, text: str):
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(tmp_path / "hosts") == dict(fetch_hostfile(str(tmp_path / "hosts")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it names no machine; give a line `host slots=8` for each machine"),
        ("# node-1 slots=8\n", "it names no machine"),
        ("node-1 slots=8\nnode-2\n", "line 2: 'node-2'; give a line `host slots=8`"),
        ("node-1 slots=eight\n", "line 1: 'node-1 slots=eight'"),
        ("node-1 slots=0\n", "line 1: 'node-1 slots=0'"),
        ("a slots=1\nb slots=1\na slots=1\n", "line 3: a stands twice; drop one"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
    ],
)
def test_what_deepspeed_would_not_start_from(tmp_path: Path, text: str | bytes, message: str):
    (tmp_path / "hosts").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        read_hostfile(tmp_path / "hosts")
    assert message in str(error.value) and "\n" not in str(error.value)
