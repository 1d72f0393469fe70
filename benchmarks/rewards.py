"""Rules that stand in for a reward model: `--reward_function benchmarks.rewards:brief`."""

from __future__ import annotations

TARGET_WORDS = 20


def brief(prompt: str, answer: str) -> float:
    """1 for a full sentence of 20 words; 0.05 less for each word away, 1 less without an end."""
    words = len(answer.split())
    length = max(-1.0, -abs(words - TARGET_WORDS) / TARGET_WORDS)
    return length + float(answer.rstrip().endswith((".", "!", "?")))
