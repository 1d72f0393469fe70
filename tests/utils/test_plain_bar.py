"""A bar in a file: whole lines, few of them, the last state among them."""

import io

from tqdm import tqdm

from dschat.utils import plain_bar
from dschat.utils.plain_bar import PlainBar


def drawn(monkeypatch, seconds: float) -> list[str]:
    """Lines of a bar of 200 steps, each of so many seconds."""
    now = [100.0]
    monkeypatch.setattr(plain_bar.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    bar = tqdm(total=200, desc="train", file=PlainBar(file), mininterval=0)
    for step in range(200):
        now[0] += seconds
        bar.update()
        bar.set_postfix_str(f"loss {step}")
    bar.close()
    assert "\r" not in file.getvalue() and file.getvalue().endswith("\n")
    return file.getvalue().splitlines()


def test_a_line_each_ten_seconds_and_the_end(monkeypatch):
    lines = drawn(monkeypatch, seconds=1.0)
    # At the start, then at 10, 20, ... 190 or 200 s, and the end.
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("train:   0%") and "200/200" in lines[-1] and "loss 199" in lines[-1]
    assert all(line == line.strip() and line for line in lines)


def test_a_short_run_is_told_in_two_lines(monkeypatch):
    lines = drawn(monkeypatch, seconds=0.01)
    assert len(lines) == 2 and "loss 199" in lines[1]
